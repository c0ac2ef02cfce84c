"""However a model is trained, its gradients are those of the dense computation, and no weight in use is out of date."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from dense import coefficients_of, dense_gradients, layer_update, run_dense
from methods import METHODS, ONE_OF_EACH, Config, adapt, config_of, lower
from peft import PeftModel, get_peft_model
from torch import nn

TARGETS = ["q_proj", "v_proj", "o_proj", "lm_head"]  # blocks and a layer outside of them, shapes shared and not

# The model computes its norms in single precision even in double precision; whatever is out of date or counted twice
# is wrong by far more.
TOLERANCE = 1e-4

Case = tuple[PeftModel, nn.Module, Config]


def differentiable_attention(case: Case) -> None:
    """The fused attention of torch has no second derivative and no forward mode."""
    case[0].get_base_model().set_attn_implementation("eager")
    case[1].set_attn_implementation("eager")


def make(method: str = "NOLA", dtype: torch.dtype = torch.float64, layers: int = 2, **options: Any) -> Case:
    """A model adapted with random coefficients, its base model, and the configuration."""
    base = tiny_models.llama(layers).to(dtype)
    model, config = adapt(base, method, **{"target_modules": TARGETS, **options})
    return model, base, config


@pytest.fixture(params=METHODS)
def case(request: pytest.FixtureRequest) -> Case:
    return make(request.param)


def make_small(method: str, dtype: torch.dtype = torch.float64) -> Case:
    """The same with layers that are called in any order."""
    base = tiny_models.Layers().to(dtype)
    model, config = adapt(base, method, target_modules=["first", "second"])
    return model, base, config


every_method = pytest.mark.parametrize("method", METHODS)
one_of_each = pytest.mark.parametrize("method", ONE_OF_EACH)


def loss_of(batch: int) -> Callable[[nn.Module], torch.Tensor]:
    x = tiny_models.tokens(seed=batch)
    return lambda model: model(input_ids=x).logits.square().mean()


def check(case: Case, *batches: int, factor: float = 1.0, tolerance: float = TOLERANCE) -> None:
    """The gradients in the model are `factor` times those of the sum of the losses of the batches."""
    model, base, config = case
    expected = dense_gradients(base, config, model, lambda m: sum(loss_of(batch)(m) for batch in batches) * factor)
    for name, parameter in coefficients_of(model).items():
        assert parameter.grad is not None, name
        torch.testing.assert_close(
            parameter.grad.double(),
            expected[name].double(),
            rtol=tolerance,
            atol=tolerance * float(expected[name].abs().max()),
            msg=lambda text, name=name: f"{name}: {text}",
        )


def check_output(case: Case, tolerance: float = TOLERANCE) -> None:
    model, base, config = case
    x = tiny_models.tokens(seed=9)
    with torch.no_grad():
        expected = run_dense(base, config, coefficients_of(model), lambda m: m(input_ids=x).logits)
        torch.testing.assert_close(model(input_ids=x).logits, expected, rtol=tolerance, atol=tolerance)


# Order of forward and backward passes


def test_plain(case: Case) -> None:
    loss_of(1)(case[0]).backward()
    check(case, 1)
    check_output(case)


def test_accumulation(case: Case) -> None:
    for batch in (1, 2, 3):
        loss_of(batch)(case[0]).backward()
    check(case, 1, 2, 3)


def test_two_forwards_one_backward(case: Case) -> None:
    (loss_of(1)(case[0]) + loss_of(2)(case[0])).backward()
    check(case, 1, 2)


@pytest.mark.parametrize("reverse", [False, True])
def test_two_forwards_two_backwards(case: Case, reverse: bool) -> None:
    losses = [loss_of(batch)(case[0]) for batch in (1, 2)]
    for loss in reversed(losses) if reverse else losses:
        loss.backward()
    check(case, 1, 2)


def test_backward_twice_through_one_graph(case: Case) -> None:
    loss = loss_of(1)(case[0])
    loss.backward(retain_graph=True)
    loss.backward()
    check(case, 1, factor=2)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_between_forward_and_backward(case: Case, context: Callable[[], Any]) -> None:
    model = case[0]
    with context():  # also builds the basis where later passes need gradients
        loss_of(3)(model)
    loss = loss_of(1)(model)
    with context():
        loss_of(3)(model)
    loss.backward()
    loss_of(2)(model).backward()
    check(case, 1, 2)


def test_double_backward(case: Case) -> None:
    differentiable_attention(case)
    model, base, config = case
    parameters = coefficients_of(model)
    gradients = torch.autograd.grad(loss_of(1)(model), list(parameters.values()), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in gradients), list(parameters.values()))

    leaves = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
    dense = torch.autograd.grad(run_dense(base, config, leaves, loss_of(1)), list(leaves.values()), create_graph=True)
    expected = torch.autograd.grad(sum(g.square().sum() for g in dense), list(leaves.values()))
    for found, right in zip(second, expected):
        torch.testing.assert_close(found, right, rtol=TOLERANCE, atol=TOLERANCE * float(right.abs().max()))


@every_method
def test_passes_that_touch_different_layers(method: str) -> None:
    model, base, config = make_small(method)
    x = torch.randn(3, 8, dtype=torch.float64)

    def loss(model: nn.Module, path: tuple[str, ...]) -> torch.Tensor:
        return model(x, path).square().sum()

    def total(model: nn.Module) -> torch.Tensor:
        return 2 * loss(model, ("first",)) + loss(model, ("second", "first")) + 2 * loss(model, ("second",))

    expected = dense_gradients(base, config, model, total)
    loss(model, ("first",)).backward()
    loss(model, ("second",)).backward()
    together = loss(model, ("first",)), loss(model, ("second",)), loss(model, ("second", "first"))
    for part in together:
        part.backward()
    for name, parameter in coefficients_of(model).items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=TOLERANCE, atol=1e-6)


@every_method
def test_layer_called_twice_in_a_pass(method: str) -> None:
    model, base, config = make_small(method)
    x = torch.randn(3, 8, dtype=torch.float64)

    def loss(model: nn.Module) -> torch.Tensor:
        return model(x, ("first", "second", "first", "first")).square().sum()

    expected = dense_gradients(base, config, model, loss)
    loss(model).backward()
    for name, parameter in coefficients_of(model).items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=TOLERANCE, atol=1e-6)


@pytest.mark.parametrize("method", [method for method in METHODS if lower(method) != "pranc"])
def test_one_layer_frozen(method: str) -> None:
    case = make(method)
    model = case[0]
    parameters = coefficients_of(model)
    frozen = next(iter(parameters.values()))
    frozen.requires_grad_(False)
    for batch in (1, 2):
        loss_of(batch)(model).backward()
    assert frozen.grad is None
    frozen.grad = dense_gradients(case[1], case[2], model, lambda m: loss_of(1)(m) + loss_of(2)(m))[
        next(iter(parameters))
    ]
    check(case, 1, 2)
    frozen.grad = None
    frozen.requires_grad_(True)
    model.zero_grad()
    loss_of(1)(model).backward()
    check(case, 1)


@pytest.mark.parametrize("method", [method for method in METHODS if lower(method) == "pranc"])
def test_one_vector_frozen(method: str) -> None:
    """Frozen, the coefficients get no gradient; trained again, they get all of it."""
    case = make(method)
    (vector,) = coefficients_of(case[0]).values()
    vector.requires_grad_(False)
    assert not loss_of(1)(case[0]).requires_grad
    vector.requires_grad_(True)
    loss_of(1)(case[0]).backward()
    check(case, 1)


def test_gradients_of_inputs_alone(case: Case) -> None:
    """A gradient that does not reach the coefficients leaves the next pass alone."""
    model = case[0]
    embedded = model.get_input_embeddings()(tiny_models.tokens()).detach().requires_grad_()
    torch.autograd.grad(model(inputs_embeds=embedded).logits.sum(), embedded)
    loss_of(1)(model).backward()
    check(case, 1)


# Activation checkpointing


def checkpointing(model: PeftModel, reentrant: bool) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()  # as the Trainer does: re-entrant checkpointing needs it
    model.train()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True], ids=["nonreentrant", "reentrant"])
class TestCheckpointing:
    def test_accumulation(self, case: Case, reentrant: bool) -> None:
        checkpointing(case[0], reentrant)
        for batch in (1, 2):
            loss_of(batch)(case[0]).backward()
        check(case, 1, 2)

    def test_two_forwards_one_backward(self, case: Case, reentrant: bool) -> None:
        checkpointing(case[0], reentrant)
        (loss_of(1)(case[0]) + loss_of(2)(case[0])).backward()
        check(case, 1, 2)

    def test_two_forwards_two_backwards(self, case: Case, reentrant: bool) -> None:
        checkpointing(case[0], reentrant)
        losses = [loss_of(batch)(case[0]) for batch in (1, 2)]
        for loss in losses:
            loss.backward()
        check(case, 1, 2)

    def test_evaluation_before_backward(self, case: Case, reentrant: bool) -> None:
        checkpointing(case[0], reentrant)
        loss = loss_of(1)(case[0])
        with torch.no_grad():
            loss_of(2)(case[0].eval())
        case[0].train()
        loss.backward()
        check(case, 1)

    @every_method
    def test_autocast(self, method: str, reentrant: bool) -> None:
        """Recomputation inside autocast meets the bits of the first pass: checkpointing checks their metadata."""
        case = make(method, torch.float32)
        for enabled in (False, True):
            if enabled:
                checkpointing(case[0], reentrant)
            case[0].zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(1)(case[0])
            loss.backward()
            gradients = [p.grad.clone() for p in coefficients_of(case[0]).values()]
            if not enabled:
                plain = gradients
        for found, expected in zip(gradients, plain):
            torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))

    @one_of_each
    def test_training(self, method: str, reentrant: bool) -> None:
        """Several optimizer steps, every one from weights that are up to date."""
        plain, checkpointed = make(method)[0], make(method)[0]
        checkpointed.load_state_dict(plain.state_dict())
        checkpointing(checkpointed, reentrant)
        for model in (plain, checkpointed):
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
            for batch in range(3):
                loss_of(batch)(model).backward()
                optimizer.step()
                optimizer.zero_grad()
        for a, b in zip(coefficients_of(plain).values(), coefficients_of(checkpointed).values()):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# Every change of the coefficients is seen


def data_write(model: PeftModel) -> None:
    for parameter in coefficients_of(model).values():
        parameter.data.mul_(-2)


def data_replaced(model: PeftModel) -> None:
    for parameter in coefficients_of(model).values():
        parameter.data = parameter.data + 1


def in_place(model: PeftModel) -> None:
    with torch.no_grad():
        for parameter in coefficients_of(model).values():
            parameter.add_(1)


def replaced(model: PeftModel) -> None:
    for name, parameter in list(model.named_parameters()):
        if "_coefficients." in name:
            owner, _, key = name.rpartition(".")
            setattr(model.get_submodule(owner), key, nn.Parameter(parameter.detach() * 3))


def loaded(model: PeftModel) -> None:
    state = {k: v + 1 if "_coefficients." in k else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)


def loaded_assign(model: PeftModel) -> None:
    state = {k: v + 1 if "_coefficients." in k else v for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def through_a_view(model: PeftModel) -> None:
    for parameter in coefficients_of(model).values():
        parameter.detach().numpy()[:] += 1.0


def one_layer(model: PeftModel) -> None:
    list(coefficients_of(model).values())[-1].data.add_(1)


def optimizer_step(model: PeftModel, **options: Any) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, **options)
    loss_of(7)(model).backward()
    optimizer.step()
    model.zero_grad()


def fused_step(model: PeftModel) -> None:
    optimizer_step(model, fused=True)


def foreach_step(model: PeftModel) -> None:
    optimizer_step(model, foreach=True)


CHANGES = [
    data_write,
    data_replaced,
    in_place,
    replaced,
    loaded,
    loaded_assign,
    through_a_view,
    one_layer,
    optimizer_step,
    fused_step,
    foreach_step,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("before", ["training", "evaluation", "inference", "unfinished"])
@one_of_each
def test_changes_are_seen(method: str, change: Callable[[PeftModel], None], before: str) -> None:
    case = make(method)
    model = case[0]

    def use() -> None:
        if before == "training":
            loss_of(5)(model).backward()
        elif before == "evaluation":
            with torch.no_grad():
                loss_of(5)(model)
        elif before == "inference":
            with torch.inference_mode():
                loss_of(5)(model)
        else:  # a pass that stops after the first block, as after an interruption
            block = model.base_model.model.model.layers[1]
            handle = block.register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                loss_of(5)(model)
            handle.remove()

    use()
    change(model)
    check_output(case)
    use()
    change(model)
    model.zero_grad()
    loss_of(1)(model).backward()
    check(case, 1)


@every_method
def test_data_write_after_a_pass_without_the_layer(method: str) -> None:
    model, base, config = make_small(method, torch.float32)
    x = torch.randn(3, 8)
    for context in (torch.no_grad, contextlib.nullcontext):
        with context():
            model(x, ("first",))
            data_write(model)
            found = model(x, ("second",))
        expected = run_dense(base, config, coefficients_of(model), lambda m: m(x, ("second",)))
        torch.testing.assert_close(found, expected)


@every_method
def test_parameters_that_share_memory_have_gradients_of_their_own(method: str) -> None:
    """New parameters with the values and the memory of the old ones: nothing but their identity tells them apart."""
    model, _, _ = make_small(method)
    x = torch.randn(3, 8, dtype=torch.float64)
    model(x, ("first",))
    coefficients = model.base_model.model.second.container("default")
    old = coefficients["default"]
    coefficients["default"] = nn.Parameter(old.detach())
    model(x, ("second",)).sum().backward()
    assert old.grad is None and coefficients["default"].grad is not None


@every_method
def test_frozen_adapter_first_used_in_inference_mode(method: str) -> None:
    """Weights that were made in inference mode serve for gradients of the inputs later."""
    model, _, _ = make(method, inference_mode=True)
    model.requires_grad_(False)
    with torch.inference_mode():
        loss_of(1)(model)
    embedded = model.get_input_embeddings()(tiny_models.tokens()).requires_grad_()
    model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad is not None


@every_method
def test_training_matches_dense_training(method: str) -> None:
    model, base, config = make(method)
    dense = {name: value.detach().clone().requires_grad_() for name, value in coefficients_of(model).items()}
    optimizers = [
        torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)
        for parameters in (list(coefficients_of(model).values()), list(dense.values()))
    ]
    for batch in range(4):
        for optimizer, loss in (
            (optimizers[0], loss_of(batch)(model)),
            (optimizers[1], run_dense(base, config, dense, loss_of(batch))),
        ):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in coefficients_of(model).items():
        torch.testing.assert_close(parameter, dense[name], rtol=1e-4, atol=1e-5)


# Precision


@every_method
def test_autocast(method: str) -> None:
    """Under autocast a layer computes what LoRA would with the same factors, which stay in float32."""
    model, base, config = make_small(method, torch.float32)
    x = torch.randn(3, 8)
    leaves = {name: value.detach().clone().requires_grad_() for name, value in coefficients_of(model).items()}

    def adapted(x: torch.Tensor) -> torch.Tensor:
        for name in ("first", "second"):
            layer = base.get_submodule(name)
            with torch.autocast("cpu", enabled=False):
                update = layer_update(config, base, name, leaves)
            if update.factors:
                A, B = update.factors
                x = layer(x) + F.linear(F.linear(x, A), B) * update.scaling
            else:
                x = layer(x) + F.linear(x, update.weight, update.bias)
            x = torch.tanh(x)
        return x

    for enabled in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found, expected = model(x, ("first", "second")), adapted(x)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected)
        gradients = torch.autograd.grad(found.float().square().sum(), list(coefficients_of(model).values()))
        right = torch.autograd.grad(expected.float().square().sum(), list(leaves.values()))
        for a, b in zip(gradients, right):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a, b, rtol=1e-2 if enabled else 1e-5, atol=1e-2 if enabled else 1e-6)


@every_method
def test_generated_weights_do_not_depend_on_autocast(method: str) -> None:
    model, _, _ = make(method, torch.float32)
    copied = copy.deepcopy(model)  # expands for itself
    found = []
    for each, enabled in ((model, False), (copied, True)):
        layer = each.base_model.model.model.layers[0].self_attn.q_proj
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            update, _ = layer.update("default")
        found.append(update if isinstance(update, tuple) else (update,))
    for plain, autocast in zip(*found):
        assert autocast.dtype == torch.float32 and torch.equal(autocast, plain)


@one_of_each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base(dtype: torch.dtype, method: str) -> None:
    """A base in half precision is trained with coefficients in float32; the output keeps the dtype of the base."""
    config = config_of(method, target_modules=TARGETS)
    model = get_peft_model(tiny_models.llama().to(dtype), config)
    base = tiny_models.llama().to(dtype).float()
    for parameter in coefficients_of(model).values():
        assert parameter.dtype == torch.float32
        parameter.data *= 0.2  # large updates of this model are ill-conditioned in half precision, dense ones as well
    output = model(input_ids=tiny_models.tokens(seed=1)).logits
    assert output.dtype == dtype
    (1024 * output.float().square().mean()).backward()  # small gradients have few bits in float16
    expected = dense_gradients(base, config, model, loss_of(1))
    for name, parameter in coefficients_of(model).items():
        torch.testing.assert_close(
            parameter.grad / 1024, expected[name], rtol=0.2, atol=0.1 * float(expected[name].abs().max())
        )


@every_method
def test_half_precision_adapter(method: str) -> None:
    config = config_of(method, target_modules=["q_proj"])
    model = get_peft_model(tiny_models.llama().bfloat16(), config, autocast_adapter_dtype=False)
    parameters = coefficients_of(model)
    assert all(p.dtype == torch.bfloat16 for p in parameters.values())
    loss_of(1)(model).backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in parameters.values())


# Copies


def test_deepcopy(case: Case) -> None:
    model, base, config = case
    loss_of(1)(model)  # a copy is made while an expansion is in use
    duplicate = copy.deepcopy(model)
    data_write(duplicate)
    loss_of(1)(model).backward()
    loss_of(1)(duplicate).backward()
    check(case, 1)
    check((duplicate, base, config), 1)
    own, copied = coefficients_of(model), coefficients_of(duplicate)
    assert not any(torch.equal(own[name].grad, copied[name].grad) for name in own)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_pickling(case: Case, how: str) -> None:
    model, base, config = case
    loss_of(1)(model)
    if how == "pickle":
        duplicate = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        duplicate = torch.load(buffer, weights_only=False)
    loss_of(1)(duplicate).backward()
    check((duplicate, base, config), 1)


@pytest.mark.parametrize(
    ("method", "options"),
    [("NOLA", {"num_basis": 1000}), ("PRANC", {"nnz": 4}), ("MCNC", {"widths": (100, 100)})],
    ids=ONE_OF_EACH,
)
def test_pickle_holds_no_basis(method: str, options: dict[str, Any]) -> None:
    model = get_peft_model(tiny_models.llama(), config_of(method, target_modules=["q_proj"], **options))
    before = len(pickle.dumps(model))
    loss_of(1)(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert sum(expansion.generator.nbytes for expansion in layer.expansions["default"]) > 2 * 4096
    assert len(pickle.dumps(model)) < before + 4096


# torch.func, torch.compile and threads


def test_functional_call(case: Case) -> None:
    model, base, config = case
    loss_of(1)(model)
    values = {name: p.detach() * 2 for name, p in model.named_parameters() if p.requires_grad}
    x = tiny_models.tokens(seed=1)
    found = torch.func.functional_call(model, values, (), {"input_ids": x}).logits
    by_layer = {name: p.detach() * 2 for name, p in coefficients_of(model).items()}
    torch.testing.assert_close(
        found, run_dense(base, config, by_layer, lambda m: m(input_ids=x).logits), rtol=TOLERANCE, atol=TOLERANCE
    )
    loss_of(1)(model).backward()
    check(case, 1)


def test_jacobian_and_vmap(case: Case) -> None:
    differentiable_attention(case)
    model, base, config = case
    x = tiny_models.tokens(batch=2, length=4)
    values = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    loss_of(1)(model)

    def logits(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, values, (), {"input_ids": x}).logits[:, -1, :3]

    jacobian = torch.func.jacrev(logits)(values)
    forward = torch.func.jacfwd(logits)(values)
    dense = torch.func.jacrev(
        lambda leaves: run_dense(base, config, leaves, lambda m: m(input_ids=x).logits[:, -1, :3])
    )({name: p.detach() for name, p in coefficients_of(model).items()})
    for name, expected in dense.items():
        key = f"base_model.model.{name}.{config.method_name.lower()}_coefficients.default.values"
        for found in (jacobian[key], forward[key]):
            torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE * float(expected.abs().max()))

    stacked = {name: torch.stack([value, -value, 2 * value]) for name, value in values.items()}
    many = torch.func.vmap(logits)(stacked)
    for i, factor in enumerate((1, -1, 2)):
        torch.testing.assert_close(
            many[i], logits({name: factor * value for name, value in values.items()}), rtol=TOLERANCE, atol=TOLERANCE
        )
    loss_of(1)(model).backward()
    check(case, 1)


@every_method
def test_transforms_of_the_inputs(method: str) -> None:
    """Parameters that a transform does not see as such: no wrapped tensor stays behind for the next pass."""
    model, base, config = make_small(method)
    x = torch.randn(3, 8, dtype=torch.float64)

    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model(x, ("first", "second")).square().sum()

    for _ in range(2):
        leaf = x.clone().requires_grad_()
        loss(model, leaf).backward()
        assert leaf.grad is not None
        torch.testing.assert_close(torch.func.grad(lambda x: loss(model, x))(x), leaf.grad)
        torch.testing.assert_close(torch.func.vmap(torch.func.grad(lambda row: loss(model, row)))(x), leaf.grad)
        torch.testing.assert_close(torch.func.jacrev(torch.func.grad(lambda x: loss(model, x)))(x).shape, (3, 8, 3, 8))
        data_write(model)
        model.zero_grad()
    expected = dense_gradients(base, config, model, lambda m: loss(m, x))
    loss(model, x).backward()
    for name, parameter in coefficients_of(model).items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=TOLERANCE, atol=1e-6)


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize(
    ("method", "fullgraph"),
    # A basis that is drawn at each use breaks the graph where it is drawn: NumPy makes its numbers.
    [
        ("NOLA", False),
        ("NOLA", True),
        ("NOLA, own bases", False),
        ("PRANC", True),
        ("PRANC, dense", False),
        ("MCNC", True),
        ("MCNC, weight", True),
    ],
)
def test_compile(method: str, fullgraph: bool) -> None:
    """Compiled, a model has the same gradients and notices new coefficients. After an eager pass its graph is whole."""
    model, base, config = make_small(method)
    x = torch.randn(3, 8, dtype=torch.float64)

    def loss(model: Any) -> torch.Tensor:
        return model(x, ("first", "second", "first")).square().sum()

    if fullgraph:
        with torch.no_grad():
            loss(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    for _ in range(2):
        expected = dense_gradients(base, config, model, loss)
        for repetition in (1, 2):
            loss(compiled).backward()
            for name, parameter in coefficients_of(model).items():
                torch.testing.assert_close(parameter.grad, repetition * expected[name], rtol=TOLERANCE, atol=1e-6)
        with torch.no_grad():
            torch.testing.assert_close(loss(compiled), loss(model))
        data_write(model)
        model.zero_grad()


@pytest.mark.usefixtures("dynamo")
def test_compile_a_language_model() -> None:
    case = make(layers=1)
    compiled = torch.compile(case[0], backend="aot_eager")
    loss_of(1)(compiled).backward()
    check(case, 1)


@pytest.mark.usefixtures("dynamo")
@one_of_each
def test_compile_with_the_default_backend(method: str) -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        pytest.skip(f"needs a C++ compiler: {error}")
    model, base, config = make_small(method, torch.float32)
    x = torch.randn(3, 8)

    def loss(model: Any) -> torch.Tensor:
        return model(x, ("first", "second")).square().sum()

    expected = dense_gradients(base, config, model, loss)
    loss(torch.compile(model)).backward()
    for name, parameter in coefficients_of(model).items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_threads(case: Case) -> None:
    """Requests served by several threads do not disturb one another."""
    model = case[0]
    batches = list(range(8))
    with torch.no_grad():
        expected = {batch: loss_of(batch)(model) for batch in batches}
    found: dict[int, list[torch.Tensor]] = {batch: [] for batch in batches}

    def serve(batch: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                found[batch].append(loss_of(batch)(model))

    threads = [threading.Thread(target=serve, args=(batch,)) for batch in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for batch in batches:
        assert len(found[batch]) == 5
        for value in found[batch]:
            torch.testing.assert_close(value, expected[batch])


@pytest.mark.parametrize("swap", [False, True])
@one_of_each
def test_dtype_changes_between_passes(method: str, swap: bool) -> None:
    """`to()` replaces tensors under the same parameters, or with `swap` exchanges the tensor objects."""
    case = make(method, torch.float32)
    model, base, config = case
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        for dtype in (torch.float64, torch.float32, torch.float64):
            loss_of(1)(model).backward()
            model.zero_grad()
            model.to(dtype)
            base.to(dtype)
            check_output(case, tolerance=1e-3 if dtype == torch.float32 else TOLERANCE)
            with torch.no_grad():
                loss_of(1)(model)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    loss_of(1)(model).backward()
    check(case, 1)


@one_of_each
def test_two_models_do_not_share_coefficients(method: str) -> None:
    """Models with the same configuration share a basis and nothing else."""
    cases = make(method), make(method)
    data_write(cases[1][0])
    losses = [loss_of(1)(case[0]) for case in cases]
    for loss in losses:
        loss.backward()
    for case in cases:
        check(case, 1)


@pytest.mark.parametrize("method", ["NOLA", "MCNC"])
def test_a_layer_that_a_pass_leaves_out_has_a_gradient_of_zero(method: str) -> None:
    layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    get_peft_model(layers, config_of(method, target_modules=["0", "1"]))
    layers[0](torch.randn(3, 8)).square().sum().backward()
    first, second = ([p.grad for p in layer.parameters() if p.requires_grad] for layer in layers)
    assert first and all(grad is not None and grad.abs().sum() > 0 for grad in first)
    assert second and all(grad is not None and not grad.any() for grad in second)
