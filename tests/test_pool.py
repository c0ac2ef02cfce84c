"""Thousands of adapters on one model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from dense import coefficients_of
from methods import METHODS, config_of, lower
from peft import LoraConfig, PeftModel, get_peft_model

from peft_ext import AdapterPool, VisualPromptConfig, set_expansion_budget
from peft_ext.tuners import idle

NAMES = ["ann", "bob", "cy", "dee"]
every_method = pytest.mark.parametrize("method", METHODS)
one_of_each = pytest.mark.parametrize("method", ["NOLA", "PRANC", "MCNC"])


def saved(folder: Path, method: str, names: list[str] = NAMES, **options: Any) -> dict[str, Path]:
    """Adapters of one kind in folders, by name, and their right outputs beside them."""
    model = get_peft_model(tiny_models.llama(), config_of(method, **options)).eval()
    for name in names:
        torch.manual_seed(sum(map(ord, name)))
        for parameter in coefficients_of(model).values():
            parameter.data.normal_()
        model.save_pretrained(str(folder / name))
        with torch.no_grad():
            torch.save(model(tiny_models.tokens(1)).logits, folder / name / "logits.pt")
    return {name: folder / name for name in names}


def right(places: dict[str, Path], name: str) -> torch.Tensor:
    return torch.load(places[name] / "logits.pt")


def pooled(method: str, places: dict[str, Path]) -> tuple[PeftModel, AdapterPool]:
    """A model with an adapter of its own, and a pool."""
    model = get_peft_model(tiny_models.llama(), config_of(method)).eval()
    pool = AdapterPool(model)
    pool.load(places)
    return model, pool


def logits(model: PeftModel, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_models.tokens(1), **inputs).logits


@every_method
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_switching(dtype: str, method: str, tmp_path: Path) -> None:
    places = saved(tmp_path, method, coefficient_dtype=dtype)
    model, pool = pooled(method, places)
    own = logits(model)
    assert list(pool) == NAMES and len(pool) == 4 and pool.nbytes == 4 * 4 * model.get_nb_trainable_parameters()[0]
    for name in ("cy", "ann", "default", "dee", "cy", "default"):
        model.set_adapter(name)
        assert model.active_adapter == name and model.active_adapters == [name]
        if name == "default":
            assert torch.equal(logits(model), own)
            continue
        alone = PeftModel.from_pretrained(tiny_models.llama(), str(places[name]))
        torch.testing.assert_close(logits(model), logits(alone), rtol=1e-5, atol=1e-6)
        if dtype == "float32":
            torch.testing.assert_close(logits(model), right(places, name), rtol=1e-5, atol=1e-6)


@one_of_each
def test_requests_by_name_in_one_batch(method: str, tmp_path: Path) -> None:
    """Adapters of the pool, in the layers or not, those that the model has beside it, and none."""
    places = saved(tmp_path, method)
    model, _ = pooled(method, places)
    own, names = logits(model), ["dee", "default", "ann", "__base__", "dee", "cy"]
    with model.disable_adapter():
        none = logits(model)
    x = tiny_models.tokens(1).expand(len(names), -1)
    for active in ("default", "cy", "dee"):
        model.set_adapter(active)
        with torch.no_grad():
            for _ in range(2):
                found = model(x, adapter_names=names).logits
                for row, name in zip(found, names):
                    expected = own if name == "default" else none if name == "__base__" else right(places, name)
                    torch.testing.assert_close(row[None], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="non-existing adapter.*: eve"):
        model(x, adapter_names=["eve"] * len(names))


@one_of_each
def test_the_layers_hold_one_of_them(method: str, tmp_path: Path) -> None:
    places = saved(tmp_path, method)
    model, _ = pooled(method, places)
    model.set_adapter("cy")
    names = {name for name, _ in model.named_parameters() if f".{lower(method)}_coefficients." in name}
    assert {name.split(".")[-2] for name in names} == {"default", "cy"}
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".cy." in name)
    assert all(status.active_adapters == ["cy"] for status in model.get_layer_status())


@one_of_each
def test_saving_one(method: str, tmp_path: Path) -> None:
    places = saved(tmp_path / "in", method)
    model, pool = pooled(method, places)
    model.set_adapter("ann")
    model.save_pretrained(str(tmp_path / "out"), selected_adapters=["ann", "dee"])
    assert pool.held == "ann" and model.active_adapter == "ann"
    for name in ("ann", "dee"):
        loaded = PeftModel.from_pretrained(tiny_models.llama(), str(tmp_path / "out" / name))
        torch.testing.assert_close(logits(loaded), right(places, name), rtol=1e-5, atol=1e-6)
        before, after = (folder / name / "adapter_model.safetensors" for folder in (tmp_path / "in", tmp_path / "out"))
        assert before.read_bytes() == after.read_bytes()


@one_of_each
def test_merging(method: str, tmp_path: Path) -> None:
    places = saved(tmp_path, method)
    model, _ = pooled(method, places)
    model.merge_adapter(["cy"])  # which the layers did not hold
    torch.testing.assert_close(logits(model), right(places, "cy"), rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("bob")
    torch.testing.assert_close(logits(model), right(places, "bob"), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="One adapter of the pool can be in the layers at a time, got 'ann' and 'cy'"):
        model.merge_adapter(["ann", "cy"])
    with pytest.raises(ValueError, match="Adapter eve not found"):
        model.merge_adapter(["eve"])
    merged = model.merge_and_unload(adapter_names=["dee"])
    with torch.no_grad():
        torch.testing.assert_close(merged(tiny_models.tokens(1)).logits, right(places, "dee"), rtol=1e-4, atol=1e-5)


@one_of_each
def test_deleting(method: str, tmp_path: Path) -> None:
    places = saved(tmp_path, method)
    model, pool = pooled(method, places)
    model.set_adapter("bob")
    model.delete_adapter("cy")
    assert list(pool) == ["ann", "bob", "dee"] and "cy" not in model.peft_config
    with pytest.raises(ValueError, match="Adapter cy not found"):
        model.set_adapter("cy")
    with pytest.warns(UserWarning, match="Adapter bob was active which is now deleted. Setting active adapter to ann"):
        model.delete_adapter("bob")
    assert model.active_adapter == "ann" and model.active_adapters == ["ann"]
    torch.testing.assert_close(logits(model), right(places, "ann"), rtol=1e-5, atol=1e-6)
    model.set_adapter("default")
    model.delete_adapter("ann")
    model.delete_adapter("dee")
    assert len(pool) == 0 and not any(".ann." in name or ".dee." in name for name, _ in model.named_parameters())
    pool.load({"cy": places["cy"]})
    model.set_adapter("cy")
    torch.testing.assert_close(logits(model), right(places, "cy"), rtol=1e-5, atol=1e-6)


def test_changes_of_the_active_one_stay_with_it(tmp_path: Path) -> None:
    places = saved(tmp_path, "NOLA")
    model, _ = pooled("NOLA", places)
    model.set_adapter("bob")
    model.set_requires_grad("bob")
    optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if ".bob." in name], lr=0.1)
    model(tiny_models.tokens(1)).logits.square().mean().backward()
    optimizer.step()
    trained = logits(model)
    assert not torch.equal(trained, right(places, "bob"))
    model.set_adapter("ann")
    torch.testing.assert_close(logits(model), right(places, "ann"), rtol=1e-5, atol=1e-6)
    model.set_adapter("bob")
    assert torch.equal(logits(model), trained)
    model.bfloat16()
    model.set_adapter("ann")
    model.float()
    model.set_adapter("bob")
    for name, parameter in model.named_parameters():
        if ".bob." in name:
            assert not torch.equal(parameter, parameter.bfloat16().float())  # a cast does not coarsen what is kept


def test_other_adapters_than_the_pool_has(tmp_path: Path) -> None:
    places = saved(tmp_path / "good", "NOLA", ["ann", "bob"])
    model, pool = pooled("NOLA", places)
    seed = saved(tmp_path / "seed", "NOLA", ["eve"], seed=4)
    with pytest.raises(ValueError, match=r"'eve': .*`seed`.*4"):
        pool.load({"fay": places["ann"], **seed})
    assert list(pool) == ["ann", "bob"] and "fay" not in model.peft_config
    modules = saved(tmp_path / "modules", "NOLA", ["eve"], target_modules=["q_proj"])
    with pytest.raises(ValueError, match="'eve': .*modules"):
        pool.load(modules)
    beside = saved(tmp_path / "beside", "NOLA", ["eve"], modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="'eve': an adapter in a pool must be coefficients alone, got '.*lm_head"):
        pool.load(beside)
    with pytest.raises(ValueError, match="`places` must have names that the model has no adapter of, got 'ann'"):
        pool.load({"ann": places["bob"]})
    with pytest.raises(FileNotFoundError, match="'eve': "):
        pool.load({"eve": tmp_path / "nowhere"})
    weights = places["bob"] / "adapter_model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-3] ^= 64
    weights.write_bytes(damaged)
    with pytest.raises(ValueError, match="'eve': "):
        pool.load({"eve": places["bob"]})
    with pytest.raises(ValueError, match="'ann' is in the model's pool: delete it first"):
        model.load_adapter(str(places["ann"]), "ann")


def test_other_base_weights_are_told(tmp_path: Path) -> None:
    places = saved(tmp_path, "NOLA", ["ann"])
    base = tiny_models.llama()
    for parameter in base.parameters():
        parameter.data *= 1.5
    pool = AdapterPool(get_peft_model(base, config_of("NOLA")))
    with pytest.warns(UserWarning, match="other weights than those that some adapters were trained on: 'ann'"):
        pool.load(places)


def test_models_that_can_have_no_pool() -> None:
    lora = get_peft_model(tiny_models.llama(), LoraConfig())
    with pytest.raises(TypeError, match="must be a PeftModel with an adapter of NOLA, PRANC or MCNC, got .*LoraModel"):
        AdapterPool(lora)
    prompts = get_peft_model(tiny_models.vit(), VisualPromptConfig(num_prompts=2))
    with pytest.raises(TypeError, match="got .* around VisualPromptModel"):
        AdapterPool(prompts)
    model = get_peft_model(tiny_models.vit(), config_of("NOLA", modules_to_save=["classifier"]))
    with pytest.raises(ValueError, match="must be coefficients alone, got 'default', which trains .*classifier"):
        AdapterPool(model)
    with pytest.raises(ValueError, match="`like` must be an adapter of the model, got 'x'"):
        AdapterPool(model, like="x")
    model = get_peft_model(tiny_models.llama(), config_of("NOLA"))
    AdapterPool(model)
    with pytest.raises(ValueError, match="must have no other pool"):
        AdapterPool(model)


@one_of_each
def test_weights_of_idle_adapters_go_when_the_budget_is_spent(method: str) -> None:
    """Those in use stay, the least recently used go first, and what is gone is made again."""
    model = get_peft_model(copy.deepcopy(tiny_models.llama()), config_of(method)).eval()
    for name in NAMES:
        model.add_adapter(name, config_of(method))
    model.eval()

    def held() -> dict[str, int]:
        layers = [layer for layer in model.modules() if isinstance(layer, model.base_model.tuner_layer_cls)]
        return {
            name: sum(kept.nbytes for kept in {e.kept for layer in layers for e in layer.expansions[name]})
            for name in NAMES
        }

    def use(name: str) -> torch.Tensor:
        model.set_adapter(name)
        return logits(model)

    before = set_expansion_budget(1 << 30)
    try:
        expected = {name: use(name) for name in NAMES}
        sizes = held()
        assert all(sizes.values())
        use("default")
        one = held()["ann"]
        use("ann")
        use("default")
        set_expansion_budget(2 * one)
        assert {name for name, size in held().items() if size} == {"ann", "dee"}  # used last
        set_expansion_budget(0)
        assert not any(held().values())
        for name in NAMES:
            assert torch.equal(use(name), expected[name])
            assert {each for each, size in held().items() if size} == {name}
    finally:
        set_expansion_budget(before)
    with pytest.raises(ValueError, match="`nbytes` must"):
        set_expansion_budget(-1)
    assert idle.budget() == before


def test_a_copy_of_the_model_has_a_pool_of_its_own(tmp_path: Path) -> None:
    places = saved(tmp_path, "NOLA", ["ann", "bob"])
    model, pool = pooled("NOLA", places)
    other = copy.deepcopy(model)
    other.set_adapter("bob")
    model.set_adapter("ann")
    for each, name in ((other, "bob"), (model, "ann")):
        torch.testing.assert_close(logits(each), right(places, name), rtol=1e-5, atol=1e-6)
    other.delete_adapter("ann")
    assert list(pool) == ["ann", "bob"] and list(other.base_model.pool) == ["bob"]


def test_each_keeps_what_it_was_saved_in(tmp_path: Path) -> None:
    places = saved(tmp_path / "int4", "NOLA", ["ann"], coefficient_dtype="int4") | saved(tmp_path, "NOLA", ["bob"])
    model, _ = pooled("NOLA", places)
    model.save_pretrained(str(tmp_path / "again"), selected_adapters=["ann", "bob"])
    for name, dtype in (("ann", "int4"), ("bob", "float32")):
        first, again = (
            PeftModel.from_pretrained(tiny_models.llama(), str(folder))
            for folder in (places[name], tmp_path / "again" / name)
        )
        assert again.peft_config["default"].coefficient_dtype == dtype  # type: ignore[attr-defined]
        assert torch.equal(logits(again), logits(first))


def test_what_another_one_does_leaves_the_active_one_active(tmp_path: Path) -> None:
    places = saved(tmp_path, "NOLA", ["ann", "bob", "cy"])
    model, _ = pooled("NOLA", places)
    model.set_adapter("bob")
    for _ in range(2):
        model.merge_adapter(["cy"])
        torch.testing.assert_close(logits(model), right(places, "cy"), rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        assert model.active_adapters == ["bob"]
        torch.testing.assert_close(logits(model), right(places, "bob"), rtol=1e-4, atol=1e-5)
    model.merge_adapter(["cy"])
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("ann")
    model.merge_adapter()
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), right(places, "ann"), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="can be trained while they are active, 'cy' is not"):
        model.set_requires_grad("cy")
    model.set_requires_grad("cy", False)
    assert model.active_adapters == ["ann"]


def test_without_the_adapter_that_it_was_made_from(tmp_path: Path) -> None:
    places = saved(tmp_path, "NOLA", ["ann", "bob"])
    model, pool = pooled("NOLA", {"ann": places["ann"]})
    model.set_adapter("ann")
    model.delete_adapter("default")
    pool.load({"bob": places["bob"]})
    model.set_adapter("bob")
    torch.testing.assert_close(logits(model), right(places, "bob"), rtol=1e-5, atol=1e-6)
    empty = AdapterPool(get_peft_model(tiny_models.llama(), config_of("NOLA")))
    empty.model.add_adapter("other", config_of("NOLA", seed=9))
    empty.model.delete_adapter("default")
    with pytest.raises(ValueError, match="'default', which the adapters of the pool are equal to, has been deleted"):
        empty.load({"bob": places["bob"]})


def test_one_of_several_active_ones(tmp_path: Path) -> None:
    """What the tuner takes for active is what the layers have on, whatever takes whose place."""
    places = saved(tmp_path, "NOLA", ["ann", "bob", "cy"])
    model, _ = pooled("NOLA", places)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default." in name:
                parameter.normal_()
    alone, tuner = logits(model), model.base_model
    tuner.set_adapter(["default", "ann"])
    both = logits(model)

    def active() -> set[tuple[str, ...]]:
        layers = [layer for layer in model.modules() if isinstance(layer, tuner.tuner_layer_cls)]
        return {tuple(tuner.active_adapters), *(tuple(layer.active_adapters) for layer in layers)}

    model.merge_adapter(["bob"])
    torch.testing.assert_close(logits(model), right(places, "bob"), rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert active() == {("default", "ann")}
    torch.testing.assert_close(logits(model), both, rtol=1e-4, atol=1e-5)
    model.merge_adapter(["bob"])
    model.delete_adapter("ann")  # which was to be active again
    model.unmerge_adapter()
    assert active() == {("default",)}
    tuner.set_adapter(["default", "cy"])
    model.delete_adapter("cy")
    assert active() == {("default",)} and model.active_adapter == "default"
    torch.testing.assert_close(logits(model), alone, rtol=1e-4, atol=1e-5)


def test_the_one_that_takes_the_place_of_a_trained_one_is_frozen(tmp_path: Path) -> None:
    places = saved(tmp_path / "in", "NOLA", ["ann", "bob"])
    model, _ = pooled("NOLA", places)

    def held(name: str) -> list[torch.nn.Parameter]:
        return [parameter for path, parameter in model.named_parameters() if f".{name}." in path]

    model.set_adapter("ann")
    model.set_requires_grad("ann")
    model(tiny_models.tokens(1)).logits.square().mean().backward()
    gradients = [parameter.grad for parameter in held("ann")]
    model.save_pretrained(str(tmp_path / "out"), selected_adapters=["bob"])  # for which it makes room for a while
    assert all(parameter.requires_grad for parameter in held("ann"))
    assert all(parameter.grad is gradient for parameter, gradient in zip(held("ann"), gradients))
    model.set_adapter("bob")
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in held("bob"))


def test_deleting_frees_memory(tmp_path: Path) -> None:
    places = saved(tmp_path, "NOLA", ["ann"])
    model, pool = pooled("NOLA", {name: places["ann"] for name in NAMES})
    for name in NAMES[1:]:
        model.delete_adapter(name)
    storages = {row.untyped_storage().data_ptr(): row.untyped_storage().nbytes() for row in pool._rows.values()}
    assert pool.nbytes == sum(storages.values())


def test_coefficients_are_kept_in_float32_whatever_is_the_default(tmp_path: Path) -> None:
    places = saved(tmp_path, "NOLA", ["ann"])
    model = get_peft_model(tiny_models.llama(), config_of("NOLA")).eval()
    pool = AdapterPool(model)
    torch.set_default_dtype(torch.bfloat16)
    try:
        pool.load(places)
    finally:
        torch.set_default_dtype(torch.float32)
    model.set_adapter("ann")
    torch.testing.assert_close(logits(model), right(places, "ann"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["a.b", "", "__base__", "keys"])
def test_names_that_no_adapter_can_have(name: str, tmp_path: Path) -> None:
    places = saved(tmp_path, "NOLA", ["ann"])
    model = get_peft_model(tiny_models.llama(), config_of("NOLA"))
    pool = AdapterPool(model)
    with pytest.raises(ValueError, match=f"`places` must have names .* got {name!r}: "):
        pool.load({name: places["ann"], "bob": places["ann"]})
    assert not len(pool) and list(model.peft_config) == ["default"]
