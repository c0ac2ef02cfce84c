"""Rows: making an adapter, saving and loading it."""

from __future__ import annotations

import copy
import pickle

import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    save_as_lora,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from transformers import AutoModelForCausalLM

from . import models
from .models import X, llama, logits
from .rows import Method, close, dense, different, folder, row

GROUP = "Making, saving, loading"


@row(GROUP, "`get_peft_model`")
def made(method: Method) -> None:
    base = llama()
    fresh = get_peft_model(copy.deepcopy(base), method.config(zero=True))
    close(logits(fresh.eval()), logits(base))
    adapted = method.adapt(base)
    different(logits(adapted), logits(base))
    close(logits(adapted), logits(dense(base, adapted)))
    assert all(adapted.prefix in name for name, each in adapted.named_parameters() if each.requires_grad)


@row(GROUP, "`inject_adapter_in_model`")
def injected(method: Method) -> None:
    base = llama()
    adapted = inject_adapter_in_model(method.config(), copy.deepcopy(base))
    different(logits(adapted), logits(base))
    close(logits(adapted), logits(dense(base, adapted)))


@row(GROUP, "`inject_adapter_in_model(state_dict=...)`")
def injected_from_tensors(method: Method) -> None:
    adapted = method.adapt(llama())
    state = {name.removeprefix("base_model.model."): t for name, t in get_peft_model_state_dict(adapted).items()}
    other = inject_adapter_in_model(method.config(target_modules=["none"]), llama(), state_dict=state)
    set_peft_model_state_dict(other, state)
    close(logits(other), logits(adapted))


@row(GROUP, "`print_trainable_parameters`")
def counted(method: Method) -> None:
    base = llama()
    adapted = method.adapt(base)
    state = get_peft_model_state_dict(adapted)
    numbers = sum(t.numel() for t in state.values() if t.is_floating_point())
    total = sum(p.numel() for p in base.parameters())
    assert adapted.get_nb_trainable_parameters() == (numbers, total + numbers)


@row(GROUP, "`save_pretrained`, `PeftModel.from_pretrained`")
def saved(method: Method) -> None:
    adapted = method.adapt(llama())
    with folder() as path:
        adapted.save_pretrained(str(path))
        close(logits(PeftModel.from_pretrained(llama(), str(path))), logits(adapted), 1e-6)


@row(GROUP, "`from_pretrained(low_cpu_mem_usage=True)`")
def saved_lean(method: Method) -> None:
    adapted = method.adapt(llama())
    with folder() as path:
        adapted.save_pretrained(str(path))
        loaded = PeftModel.from_pretrained(llama(), str(path), low_cpu_mem_usage=True)
        close(logits(loaded), logits(adapted), 1e-6)


@row(GROUP, "`save_pretrained(safe_serialization=False)`")
def pickled_file(method: Method) -> None:
    adapted = method.adapt(llama())
    with folder() as path:
        adapted.save_pretrained(str(path), safe_serialization=False)
        close(logits(PeftModel.from_pretrained(llama(), str(path))), logits(adapted), 1e-6)


@row(GROUP, "`get_peft_model_state_dict`, `set_peft_model_state_dict`")
def tensors(method: Method) -> None:
    adapted = method.adapt(llama())
    other = get_peft_model(llama(), method.config(zero=True)).eval()
    set_peft_model_state_dict(other, get_peft_model_state_dict(adapted))
    close(logits(other), logits(adapted), 1e-6)


@row(GROUP, "`AutoPeftModel`, `AutoModel` of an adapter's folder")
def auto(method: Method) -> None:
    with folder() as path:
        llama().save_pretrained(path / "base")
        base = AutoModelForCausalLM.from_pretrained(path / "base")
        adapted = get_peft_model(base, method.config(task_type="CAUSAL_LM")).eval()
        adapted.save_pretrained(str(path / "adapter"))
        for auto_class in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
            close(logits(auto_class.from_pretrained(path / "adapter")), logits(adapted), 1e-6)


@row(GROUP, "transformers' `add_adapter`, `load_adapter`, `set_adapter`")
def of_transformers(method: Method) -> None:
    base = llama()
    own = llama()
    own.add_adapter(method.config(), "first")
    expected = logits(dense(base, own, first=1.0))
    close(logits(own), expected)
    with folder() as path:
        own.save_pretrained(path)
        loaded = llama()
        loaded.load_adapter(str(path), adapter_name="first")
        loaded.add_adapter(method.config(target_modules=["o_proj"]), "second")
    close(logits(loaded), logits(dense(base, loaded, second=1.0)))
    loaded.set_adapter("first")
    close(logits(loaded), expected)
    loaded.disable_adapters()
    close(logits(loaded), logits(base), 1e-6)


@row(GROUP, "`copy.deepcopy`, `pickle`")
def copied(method: Method) -> None:
    adapted = method.adapt(llama())
    expected = logits(adapted)
    for other in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        close(logits(other), expected, 1e-6)
        for parameter in other.parameters():
            parameter.data.zero_()
        close(logits(adapted), expected, 1e-6)


@row(GROUP, "`convert_to_lora`, `save_as_lora`, linear layers")
def converted(method: Method) -> str | None:
    base = llama()
    adapted = method.adapt(base)
    rank = 0.9999999 if method.name == "PRANC" else 2  # below 1: that part of the squared singular values
    config, _ = convert_to_lora(adapted, rank=rank)
    assert isinstance(config, LoraConfig)
    with folder() as path:
        save_as_lora(path, adapted, rank=rank)
        close(logits(PeftModel.from_pretrained(base, str(path))), logits(adapted), 1e-3)
    return None


@row(GROUP, "`convert_to_lora`, embeddings and convolutions")
def converted_others(method: Method) -> None:
    names = {"embedding": torch.arange(5), "conv2d": models.images()}
    for name, x in names.items():
        adapted = method.adapt(models.Layers(), target_modules=[name])
        expected = adapted(x, name)
        with folder() as path:
            save_as_lora(path, adapted, rank=1.0 if method.name == "PRANC" else 2)
            close(PeftModel.from_pretrained(models.Layers(), str(path))(x, name), expected, 1e-3)


@row(GROUP, "`hotswap_adapter`")
def hotswapped(method: Method) -> None:
    one, two = method.adapt(llama()), method.adapt(llama())
    with folder() as path:
        two.save_pretrained(str(path))
        hotswap_adapter(one, str(path), adapter_name="default")
    close(logits(one), logits(two), 1e-6)


@row(GROUP, "`PeftMixedModel` (`mixed=True`)")
def mixed_types(method: Method) -> None:
    base = llama()
    mixed = get_peft_model(copy.deepcopy(base), method.config(), mixed=True)
    close(logits(mixed.eval()), logits(dense(base, mixed)))


@row(GROUP, "`generate`")
def generated(method: Method) -> None:
    base = llama()
    adapted = method.adapt(base)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    prompt = X[:2, :4]
    found = adapted.generate(input_ids=prompt, **settings)
    assert torch.equal(found, dense(base, adapted).generate(input_ids=prompt, **settings))
    assert not torch.equal(found, base.generate(input_ids=prompt, **settings)), "no effect"
