"""Flat training: what noise the weights have, when, and that they are the same afterwards."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_models
import torch
from methods import METHODS, adapt
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from peft_ext import NolaConfig, PrancConfig, VisualPromptConfig
from peft_ext.training.callbacks import trainable_parameters, trainable_state
from peft_ext.training.flat import _ADDITIVE, FlatTraining, check_perturbable, perturbed
from peft_ext.training.trainer import EvaluationTrainer, fit

LORA = {"r": 2, "init_lora_weights": False}
OPTIONS: dict[str, dict[str, Any]] = {
    "adalora": {"init_r": 4, "target_r": 2, "total_step": 10},
    "c3a": {"block_size": 8},
    "delora": {"r": 2},
    "fourierft": {"n_frequency": 9},
    "gralora": {"r": 4, "gralora_k": 2},
    "shira": {"r": 2},
    "tinylora": {"r": 2},
    "unilora": {"r": 2, "theta_d_length": 20},
    "vblora": {"r": 2, "num_vectors": 8, "vector_length": 8, "topk": 2},
    "waveft": {"n_frequency": 9},
}


def base(width: int = 24) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, 3))
    with torch.no_grad():
        model[0].weight.mul_(torch.logspace(-2, 1, 2 * width)[:, None])  # rows of very different norms
    return model


def adapted(method: str, width: int = 24) -> Any:
    if method == "LoRA":
        return get_peft_model(base(width), LoraConfig(target_modules=["0", "2"], **LORA))
    return adapt(base(width), method, target_modules=["0", "2"])[0]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


@pytest.mark.parametrize("method", ["LoRA", *METHODS])
def test_the_noise_is_that_of_the_paper(method: str) -> None:
    model = adapted(method, 96)
    merged: Any = copy.deepcopy(model).merge_and_unload()
    before, sigma, x = weights(model), 0.3, torch.randn(5, 96)
    with perturbed(model, sigma, seed=1, step=2):
        for place in (0, 2):
            layer = model.base_model.model[place].base_layer
            noise = layer.weight - before[f"base_model.model.{place}.base_layer.weight"]
            merged[place].weight.data += noise
            row_norms = (merged[place].weight - noise).norm(dim=1, keepdim=True)
            standard = noise / (sigma * row_norms / math.sqrt(noise.shape[1]))
            if place == 0:  # 18,432 numbers
                assert abs(float(standard.mean())) < 0.03 and abs(float(standard.std()) - 1) < 0.03
                for bound in (0.5, 1, 2, 3):
                    share = float((standard.abs() < bound).double().mean())
                    assert abs(share - math.erf(bound / math.sqrt(2))) < 0.012
                assert 3.4 < float(standard.abs().max()) < 6
                assert float((standard.std(dim=1) - 1).abs().max()) < 0.35  # in every row
            else:
                assert abs(float(standard.std()) - 1) < 0.12
        torch.testing.assert_close(model(x), merged(x), atol=1e-3, rtol=1e-4)
    assert_same(weights(model), before)


def test_the_variance_of_an_output_grows_by_one_and_sigma_squared() -> None:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(400, 300, bias=False)), NolaConfig(target_modules=["0"]))
    x = torch.randn(200, 400)
    plain = float(model(x).detach().var())
    with perturbed(model, 0.5, seed=0):
        assert float(model(x).detach().var()) / plain == pytest.approx(1.25, abs=0.03)


@pytest.mark.parametrize("kind", ["embedding", "Conv1D", "convolution"])
def test_rows_are_outputs_and_tokens(kind: str) -> None:
    """Of weights that are stored otherwise too: noise in proportion to the norms, and none where they are zero."""
    layer: Any
    if kind == "embedding":
        layer = nn.Embedding(64, 48, padding_idx=3)
        target, rows = layer.weight, layer.weight
    elif kind == "Conv1D":
        layer = tiny_models.gpt2().transformer.h[0].attn.c_attn
        target, rows = layer.weight, layer.weight.T
    else:
        layer = nn.Conv2d(6, 32, 3)
        target, rows = layer.weight, layer.weight.flatten(1)
    with torch.no_grad():
        rows.mul_(torch.logspace(-3, 3, len(rows))[:, None])
        rows[3] = 0
    model = get_peft_model(nn.Sequential(layer), NolaConfig(target_modules=["0"], r=2, num_basis=4))
    before = target.detach().clone()
    norms = rows.detach().norm(dim=1)
    with perturbed(model, 0.1, seed=0):
        turned = (target - before).T if kind == "Conv1D" else (target - before).flatten(1)
        ratio = turned.norm(dim=1) / norms
    assert bool(ratio[3].isnan())
    others = torch.cat((ratio[:3], ratio[4:]))
    assert float(others.mean()) == pytest.approx(0.1, rel=0.05) and float(others.max() / others.min()) < 2
    assert torch.equal(target, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["LoRA", "PRANC"])
def test_weights_are_the_same_to_the_bit_afterwards(method: str, dtype: torch.dtype) -> None:
    model = adapted(method).to(dtype)
    before = weights(model)
    for step in range(20):
        with perturbed(model, 0.05, seed=0, step=step), perturbed(model, 0.2, seed=1, step=step):
            changed = weights(model)
            model(torch.randn(2, 24, dtype=dtype)).sum().backward()
    assert changed["base_model.model.0.base_layer.weight"].dtype == dtype
    assert not torch.equal(
        changed["base_model.model.0.base_layer.weight"], before["base_model.model.0.base_layer.weight"]
    )
    assert_same(weights(model), before)
    with pytest.raises(KeyError), perturbed(model, 0.05, seed=0):
        raise KeyError
    assert_same(weights(model), before)


def test_noise_depends_on_seed_step_and_layer_alone() -> None:
    model = adapted("NOLA")

    def noisy(seed: int, step: int, state: int = 0) -> dict[str, torch.Tensor]:
        torch.manual_seed(state)
        drawn = torch.get_rng_state()
        with perturbed(model, 0.1, seed, step):
            found = weights(model)
        assert torch.equal(torch.get_rng_state(), drawn)
        return found

    first = noisy(3, 7)
    assert_same(noisy(3, 7, state=5), first)
    torch.set_default_dtype(torch.float64)
    assert_same(noisy(3, 7), first)
    torch.set_default_dtype(torch.float32)
    name = "base_model.model.0.base_layer.weight"
    assert not torch.equal(noisy(3, 8)[name], first[name]) and not torch.equal(noisy(4, 7)[name], first[name])
    compiled = nn.Module()
    compiled.add_module("_orig_mod", model)
    with perturbed(compiled, 0.1, 3, 7):
        assert_same(weights(model), first)

    torch.manual_seed(0)
    twins = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    twins["b"].load_state_dict(twins["a"].state_dict())
    pair = get_peft_model(twins, LoraConfig(target_modules=["a", "b"]))
    with perturbed(pair, 0.1, 0):
        assert not torch.equal(twins["a"].base_layer.weight, twins["b"].base_layer.weight)


def test_a_weight_that_layers_share_has_noise_once() -> None:
    model = tiny_models.llama(tie_word_embeddings=True)
    before = model.get_input_embeddings().weight.detach().clone()
    adapter = get_peft_model(model, NolaConfig(target_modules=["embed_tokens", "lm_head"], r=2, num_basis=4))
    with perturbed(adapter, 0.1, seed=0):
        noise = adapter.get_input_embeddings().weight - before
        assert float((noise.norm() / before.norm()).detach()) == pytest.approx(0.1, rel=0.1)
    assert torch.equal(model.lm_head.base_layer.weight, before)


def test_merged_and_disabled_adapters_and_those_on_top_of_others() -> None:
    model, x = adapted("NOLA"), torch.randn(3, 24)
    with perturbed(model, 0.2, seed=0):
        expected = model(x)
    model.merge_adapter()
    with perturbed(model, 0.2, seed=0):
        torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(RuntimeError, match="merged or unmerged while"), perturbed(model, 0.2, seed=0):
        model.unmerge_adapter()

    model = adapted("NOLA")
    plain = copy.deepcopy(model)
    for parameter in trainable_parameters(plain).values():
        parameter.data.zero_()
    with model.disable_adapter(), perturbed(model, 0.2, seed=0), perturbed(plain, 0.2, seed=0):
        assert torch.equal(model(x), plain(x))  # the norms are those of the base weight

    outer = get_peft_model(adapted("NOLA").base_model.model, LoraConfig(target_modules=["0"], **LORA))
    layer = outer.base_model.model[0]
    W = layer.get_base_layer().weight.detach().clone()
    total = (W + layer.get_delta_weight("default") + layer.base_layer.get_delta_weight("default")).detach()
    with perturbed(outer, 0.2, seed=0):
        noise = layer.get_base_layer().weight - W
    assert float((noise.norm(dim=1) / total.norm(dim=1)).mean()) == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize("name", _ADDITIVE)
def test_methods_of_peft_that_add_an_update(name: str) -> None:
    config_class = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(name.upper())]
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(16, 16)), config_class(target_modules=["0"], **OPTIONS.get(name, {}))
    ).eval()
    for parameter in trainable_parameters(model).values():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    layer, x = model.base_model.model[0], torch.randn(4, 16)
    W = layer.get_base_layer().weight.detach().clone()
    with torch.no_grad():
        update = layer.get_delta_weight("default")
        with perturbed(model, 0.2, seed=0):
            noise = layer.get_base_layer().weight - W
            assert bool(noise.any()) and bool(update.any())
            expected = nn.functional.linear(x, W + update + noise, layer.get_base_layer().bias)
            torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(noise.norm() / (W + update).norm(), torch.tensor(0.2), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: get_peft_model(base(), LoraConfig(target_modules=["0"], use_dora=True)),
            "model.0'.*LoRA variant of 'default' does",
        ),
        (lambda: get_peft_model(base(), peft.OFTConfig(target_modules=["0"], oft_block_size=8)), "oft does more than"),
        (lambda: get_peft_model(base(), peft.HiraConfig(target_modules=["0"], r=2)), "hira does more than add"),
        (
            lambda: get_peft_model(base(), peft.IA3Config(target_modules=["0"], feedforward_modules=[])),
            "ia3 does more than add an update.*Use NOLA, PRANC, MCNC, plain LoRA or another",
        ),
        (
            lambda: get_peft_model(
                nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), PrancConfig(num_coefficients=4, target_modules=["1"])
            ),
            "model.1'.*this is a LayerNorm. Leave it out of `target_modules`",
        ),
        (lambda: get_peft_model(tiny_models.vit(), VisualPromptConfig(num_prompts=2)), "VisualPrompt.*does more than"),
        (lambda: base(), "no active adapter changes weights"),
    ],
)
def test_what_has_no_merged_weight_is_refused(make: Any, message: str) -> None:
    model = make()
    with pytest.raises(ValueError, match=message):
        check_perturbable(model)
    with pytest.raises(ValueError, match=message), perturbed(model, 0.1, seed=0):
        pass


@pytest.mark.parametrize("config", [NolaConfig, LoraConfig])
def test_quantized_sharded_and_absent_weights_are_refused(config: Any) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(16, 16)), config(target_modules=["0"]))
    base_layer = model.base_model.model[0].get_base_layer()
    whole = base_layer.weight
    for weight, message in (
        (nn.Parameter(torch.zeros(16, 16, dtype=torch.int8), requires_grad=False), "quantized.*Load the base model in"),
        (nn.Parameter(torch.zeros(16, 16).to(torch.float8_e4m3fn), requires_grad=False), "is quantized"),
        (nn.Parameter(torch.zeros(0)), "sharded or offloaded"),
        (nn.Parameter(torch.zeros(16, 16, device="meta")), "sharded or offloaded"),
    ):
        base_layer.weight = weight
        with pytest.raises(ValueError, match=message):
            check_perturbable(model)
    base_layer.weight = whole
    check_perturbable(model)
    bitsandbytes = pytest.importorskip("bitsandbytes")
    quantized = nn.Sequential(bitsandbytes.nn.Linear8bitLt(16, 16, has_fp16_weights=False))
    with pytest.raises(ValueError, match="the weight of the Linear8bitLt is quantized"):
        check_perturbable(get_peft_model(quantized, config(target_modules=["0"])))


def test_arguments_are_checked() -> None:
    for sigma in (0, -1, math.nan, "x"):
        with pytest.raises(ValueError, match="`sigma` must be"):
            FlatTraining(sigma=sigma)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`seed` must be"):
        FlatTraining(seed=-1)
    with pytest.raises(ValueError, match="`sigma` must be at least 0"), perturbed(adapted("NOLA"), -0.1, seed=0):
        pass


# The Trainer.


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = base()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layers(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def classifier(method: str = "NOLA") -> Any:
    torch.manual_seed(0)
    if method == "LoRA":
        return get_peft_model(Classifier(), LoraConfig(target_modules=["layers.0"], **LORA))
    return adapt(Classifier(), method, target_modules=["layers.0"])[0]


def examples(count: int = 16) -> list[dict[str, torch.Tensor]]:
    x = torch.randn(count, 24, generator=torch.Generator().manual_seed(1))
    return [{"x": row, "labels": row[:3].argmax()} for row in x]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return tiny_models.arguments(folder, **{"max_steps": 6, **options})


def train(
    model: Any, folder: Path, *more: TrainerCallback, sigma: float = 0.5, resume: Any = None, **options: Any
) -> Any:
    with FlatTraining(sigma, seed=4) as flat:
        trainer = Trainer(
            model, arguments(folder, **options), train_dataset=examples(), callbacks=[flat, *more],
            data_collator=default_data_collator,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("method", ["LoRA", "NOLA", "PRANC", "MCNC, weight"])
def test_a_training_is_that_of_a_loop_with_growing_noise(method: str, tmp_path: Path) -> None:
    model, reference = classifier(method), classifier(method)
    before = weights(model)
    train(model, tmp_path)

    optimizer = torch.optim.AdamW(trainable_parameters(reference).values(), lr=1e-2, weight_decay=0.0)
    rows = examples()
    for step in range(6):
        batch = default_data_collator([rows[(4 * step + place) % 16] for place in range(4)])
        with perturbed(reference, 0.5 * (1 - math.cos(math.pi * step / 6)) / 2, seed=4, step=step):
            reference(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = trainable_state(reference)
    for name, parameter in trainable_state(model).items():
        torch.testing.assert_close(parameter, expected[name], atol=1e-6, rtol=1e-5)

    other = classifier(method)
    train(other, tmp_path, sigma=1e-9)
    assert any(not torch.allclose(value, expected[name], atol=1e-4) for name, value in trainable_state(other).items())
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert_same({name: model.state_dict()[name] for name in frozen}, {name: before[name] for name in frozen})


def test_batches_of_a_step_have_the_same_noise(tmp_path: Path) -> None:
    whole, parts = classifier(), classifier()
    train(whole, tmp_path)
    train(parts, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    for name, value in trainable_state(whole).items():
        torch.testing.assert_close(trainable_state(parts)[name], value, atol=1e-5, rtol=1e-4)


def test_a_training_that_goes_on_from_a_checkpoint_ends_as_one_that_was_not_interrupted(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "train_sampling_strategy": "random", "max_grad_norm": 1.0}
    whole, resumed = classifier(), classifier()
    train(whole, tmp_path, **saving)
    assert (tmp_path / "checkpoint-4").is_dir()
    train(resumed, tmp_path, **saving, resume=str(tmp_path / "checkpoint-4"))
    assert_same(weights(resumed), weights(whole))


class Breaks(TrainerCallback):
    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


class Stops(TrainerCallback):
    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 3


class Looks(TrainerCallback):
    """Notes a weight when a step begins, before the optimizer's part, and when an evaluation is done."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, torch.Tensor]] = []

    def note(self, event: str, model: Any) -> None:
        self.seen.append((event, model.base_model.model.layers[0].base_layer.weight.detach().clone()))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.note("begin", kwargs["model"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.note("optimizer", kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.note("end", kwargs["model"])


def test_weights_are_put_back_before_the_optimizer_and_after_interruptions(tmp_path: Path) -> None:
    model = classifier()
    before = model.base_model.model.layers[0].base_layer.weight.detach().clone()
    looks = Looks()
    train(model, tmp_path, looks)
    steps = [weight for event, weight in looks.seen if event == "begin"]
    assert torch.equal(steps[0], before)  # the noise grows from nothing
    sizes = [float((weight - before).norm()) for weight in steps]
    assert sizes == sorted(sizes) and sizes[1] > 0
    assert all(torch.equal(weight, before) for event, weight in looks.seen if event != "begin")

    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    looks = Looks()
    train(model, tmp_path, looks, Stops(), **halves)
    assert [event for event, _ in looks.seen].count("optimizer") == 3  # the fourth step was begun and not ended
    assert looks.seen[-1][0] == "end" and torch.equal(looks.seen[-1][1], before)
    with pytest.raises(KeyboardInterrupt):
        train(model, tmp_path, Breaks(), **halves)
    assert torch.equal(model.base_model.model.layers[0].base_layer.weight, before)


def test_a_training_that_could_leave_noise_or_would_have_none_is_refused(tmp_path: Path) -> None:
    model = classifier()
    trainer = Trainer(model, arguments(tmp_path), train_dataset=examples(), callbacks=[FlatTraining()])
    with pytest.raises(RuntimeError, match="must be entered.*with FlatTraining"):
        trainer.train()
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into the weights"):
        train(model, tmp_path)


def test_passed_over_blocks_and_checkpointed_ones_give_the_same(tmp_path: Path) -> None:
    """In evaluation mode frozen blocks are passed over, in training mode checkpointed ones are computed twice."""

    class Whole(EvaluationTrainer):
        prefix_memory = 0.0

    rows = [{"pixel_values": torch.randn(3, 16, 16), "labels": torch.tensor(place % 3)} for place in range(8)]
    settings = {"max_steps": 6, "per_device_train_batch_size": 4}

    def trained(trainer: Any, **options: Any) -> dict[str, torch.Tensor]:
        config = NolaConfig(
            r=2, num_basis=4, layers_to_transform=[1], init_weights=False, modules_to_save=["classifier"]
        )
        model = tiny_models.vit()
        torch.manual_seed(0)
        model = get_peft_model(model, config)
        with FlatTraining(0.5, seed=0) as flat:
            training = arguments(tmp_path, **settings, **options)
            fit(model, rows, default_data_collator, training, trainer, callbacks=[flat])
        return trainable_state(model)

    whole = trained(Whole)
    assert_same(trained(EvaluationTrainer), whole)
    once, twice = trained(Trainer), trained(Trainer, gradient_checkpointing=True)
    for name, value in once.items():
        torch.testing.assert_close(twice[name], value, atol=1e-6, rtol=1e-5)
