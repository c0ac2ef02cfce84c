"""Rows: training, precision, compilers and transforms."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn

from .models import X, llama, logits
from .rows import Method, adapted_layers, close, dense, different, folder, row

GROUP = "Training"
COMPILING = "Compilers and transforms"


def trainable(model: Any) -> dict[str, Any]:
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def gradients(model: Any) -> dict[str, Any]:
    """The gradients of the loss on the usual tokens."""
    model.zero_grad()
    model(input_ids=X, labels=X).loss.backward()
    found = {name: each.grad.clone() for name, each in trainable(model).items() if each.grad is not None}
    assert found, "no gradients"
    return found


def alike(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-4) -> None:
    assert found.keys() == expected.keys(), "gradients of other parameters"
    for name, value in expected.items():
        close(found[name], value, tolerance)


@row(GROUP, "`Trainer`, resumed from a checkpoint")
def trainer(method: Method) -> None:
    rows = [{"input_ids": each, "labels": each} for each in X.repeat(2, 1)]
    with folder() as path:
        arguments = transformers.TrainingArguments(
            output_dir=str(path), max_steps=4, per_device_train_batch_size=2, learning_rate=0.05, save_steps=2
        )
        arguments.report_to, arguments.disable_tqdm, arguments.use_cpu = [], True, True
        arguments.set_logging(strategy="no")

        def train(model: Any, start: str | None = None) -> Any:
            trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
            trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
            trainer.train(resume_from_checkpoint=start)
            return model.eval()

        base = llama()
        through = method.adapt(base, zero=True)
        train(through)
        different(logits(through), logits(base))
        resumed = train(method.adapt(base, zero=True), str(path / "checkpoint-2"))
        close(logits(resumed), logits(through), 1e-5)


def checkpointed(method: Method, reentrant: bool) -> None:
    adapted = method.adapt(llama()).train()
    expected = gradients(adapted)
    adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    adapted.enable_input_require_grads()
    alike(gradients(adapted), expected)


@row(GROUP, "gradient checkpointing, re-entrant")
def checkpointed_reentrant(method: Method) -> None:
    checkpointed(method, True)


@row(GROUP, "gradient checkpointing, non-re-entrant")
def checkpointed_once(method: Method) -> None:
    checkpointed(method, False)


@row(GROUP, "a base model in bfloat16")
def half(method: Method) -> None:
    base = llama().to(torch.bfloat16)
    adapted = method.adapt(base)
    assert {each.dtype for each in trainable(adapted).values()} == {torch.float32}
    found = logits(adapted)
    assert found.dtype == torch.bfloat16
    exact = dense(llama().to(torch.bfloat16).float(), adapted)
    expected, rounded = logits(exact), logits(copy.deepcopy(exact).to(torch.bfloat16))
    error, usual = (found - expected).norm(), (rounded - expected).norm()
    assert error < 2 * usual, f"off by {error:.2g} in norm, a merged model in bfloat16 by {usual:.2g}"
    different(found, logits(base))
    gradients(adapted)


@row(GROUP, "autocast to bfloat16")
def autocast(method: Method) -> None:
    adapted = method.adapt(llama()).train()
    expected, exact = gradients(adapted), logits(adapted)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(adapted)
        close(found, exact, 0.03)
        alike(gradients(adapted), expected, 0.2)


@row(GROUP, '`bias="all"`')
def biases(method: Method) -> None:
    adapted = method.adapt(llama(attention_bias=True), bias="all")
    found = gradients(adapted)
    assert sum(name.endswith(".bias") for name in found) == 2 * 4
    for name, each in trainable(adapted).items():
        if name.endswith(".bias"):
            each.data.normal_()
    with folder() as path:
        adapted.save_pretrained(str(path))
        close(logits(PeftModel.from_pretrained(llama(attention_bias=True), str(path))), logits(adapted), 1e-6)


@row(GROUP, "`modules_to_save`")
def whole_modules(method: Method) -> None:
    adapted = method.adapt(llama(), modules_to_save=["lm_head"])
    assert any("lm_head.modules_to_save.default" in name for name in gradients(adapted))
    adapted.get_base_model().lm_head.modules_to_save["default"].weight.data.normal_()
    with folder() as path:
        adapted.save_pretrained(str(path))
        close(logits(PeftModel.from_pretrained(llama(), str(path))), logits(adapted), 1e-6)
        close(logits(adapted.merge_and_unload()), logits(PeftModel.from_pretrained(llama(), str(path))))


@row(GROUP, "`trainable_token_indices`")
def single_tokens(method: Method) -> None:
    adapted = method.adapt(llama(), trainable_token_indices=[5, 7])
    assert any("trainable_tokens_delta" in name for name in gradients(adapted))


def tied(method: Method, **options: Any) -> tuple[Any, Any]:
    """A model whose head is its embedding, and a copy in which the embedding is adapted."""
    base = llama(tie_word_embeddings=True)
    return base, method.adapt(base, target_modules=["embed_tokens"], **options)


@row(GROUP, "an adapted embedding that the head is tied to")
def tied_embedding(method: Method) -> str | None:
    """Without the option, PEFT adapts the embedding alone and says so; merging must not change the head silently."""
    base, adapted = tied(method)
    expected: Any = copy.deepcopy(base)
    expected.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone())
    (layer,) = adapted_layers(adapted).values()
    expected.model.embed_tokens.weight.data += layer.get_delta_weight("default")
    close(logits(adapted), logits(expected))
    found = logits(adapted.merge_and_unload())
    close(found, logits(expected))
    return None


@row(GROUP, "`ensure_weight_tying=True`")
def tied_on_purpose(method: Method) -> None:
    base, adapted = tied(method, ensure_weight_tying=True)
    layer = adapted_layers(adapted)["model.embed_tokens"]
    expected: Any = copy.deepcopy(base)
    expected.model.embed_tokens.weight.data += layer.get_delta_weight("default")
    assert expected.lm_head.weight is expected.model.embed_tokens.weight
    close(logits(adapted), logits(expected))


@row(COMPILING, "`torch.compile`, forward and backward", slow=True)
def compiled(method: Method) -> None:
    adapted = method.adapt(llama(num_hidden_layers=1))
    expected, exact = gradients(adapted), logits(adapted)
    torch._dynamo.reset()
    fast = torch.compile(adapted, backend="aot_eager")
    close(fast(X).logits, exact)
    alike({name.removeprefix("_orig_mod."): each for name, each in gradients(fast).items()}, expected)


@row(COMPILING, "`torch.export` with a dynamic batch", slow=True)
def exported(method: Method) -> None:
    base = llama(num_hidden_layers=1, use_cache=False)
    adapted = method.adapt(base)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = adapted

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids, use_cache=False).logits

    program = torch.export.export(
        Logits(), (X,), dynamic_shapes={"input_ids": {0: torch.export.Dim("batch", min=1, max=64)}}
    ).module()
    reference = dense(base, adapted)
    for batch in (1, 3, 40):
        x = X.repeat(10, 1)[:batch]
        close(program(x), logits(reference, x))


@row(COMPILING, "`torch.func.functional_call`, `jacrev`, `vmap`")
def functional(method: Method) -> None:
    adapted = method.adapt(llama(num_hidden_layers=1, attn_implementation="eager"))
    parameters = {name: each.detach() for name, each in trainable(adapted).items()}

    def out(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(adapted, parameters, (X[:1],)).logits[0, -1, :3]

    close(out(parameters), logits(adapted, X[:1])[0, -1, :3])
    jacobian = torch.func.jacrev(out)(parameters)
    for i in range(3):
        adapted.zero_grad()
        adapted(X[:1]).logits[0, -1, i].backward()
        alike({name: each[i] for name, each in jacobian.items()}, {n: p.grad for n, p in trainable(adapted).items()})


@row(COMPILING, "coefficients changed between two calls without gradients")
def changed(method: Method) -> None:
    base = llama()
    adapted = method.adapt(base)
    logits(adapted)
    for each in trainable(adapted).values():
        each.data.mul_(2)
    close(logits(adapted), logits(dense(base, adapted)))
    fresh = get_peft_model(base, method.config())
    fresh.load_state_dict(adapted.state_dict())
    close(logits(adapted), logits(fresh.eval()))
