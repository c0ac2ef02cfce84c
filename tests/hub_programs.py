"""What test_hub.py runs in processes of their own, where huggingface_hub's client talks to a hub on this machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_models
import torch
from huggingface_hub import CommitInfo, EvalResult, HfApi, ModelCard
from methods import config_of
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

import peft_ext
from peft_ext.__main__ import main
from peft_ext.adapters.trainer import DescribingTrainer

torch.set_num_threads(1)  # as in the tests: the order of sums depends on it

KINDS = ["NOLA", "PRANC", "MCNC", "VISUAL_PROMPT"]
RESULT = EvalResult("text-generation", "e2e_nlg", "E2E", "bleu", 0.66)


def base(kind: str) -> nn.Module:
    return tiny_models.vit() if kind == "VISUAL_PROMPT" else tiny_models.llama()


def adapter(kind: str, seed: int = 1) -> PeftModel:
    if kind == "VISUAL_PROMPT":
        config: Any = peft_ext.VisualPromptConfig(num_prompts=3, seed=seed)
    else:
        config = config_of(kind, target_modules=["q_proj", "v_proj"], seed=seed, task_type="CAUSAL_LM")
    torch.manual_seed(seed)
    return get_peft_model(base(kind), config).eval()


def several() -> PeftModel:
    model = adapter("NOLA", 1)
    model.add_adapter("other", config_of("NOLA", target_modules=["o_proj"], task_type="CAUSAL_LM", seed=6))
    return model


def network(seed: int = 1) -> peft_ext.SeededNetwork:
    made = peft_ext.SeededNetwork(tiny_models.vit(), peft_ext.PrancConfig(num_coefficients=100, seed=seed))
    torch.manual_seed(seed)
    for parameter in made.parameters():
        parameter.data.normal_()
    return made.eval()


@torch.no_grad()
def logits(model: nn.Module, kind: str) -> torch.Tensor:
    if kind in ("VISUAL_PROMPT", "NETWORK"):
        return model(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))).logits
    return model(tiny_models.tokens()).logits


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def trained(trainer_class: type[Trainer], folder: Path, **options: Any) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in tiny_models.tokens()]
    settings = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(str(folder), **{**settings, **options})
    model = adapter("NOLA")
    if trainer_class is Trainer:  # whose card of a base model without a name the hub refuses
        model.base_model.model.config._name_or_path = "somebody/tiny-llama"
    trainer = trainer_class(model=model, args=arguments, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    return trainer


def publish(folder: str) -> dict[str, Any]:
    """Ann, who is logged in, uploads everything."""
    hub, told = HfApi(), {}
    for kind in KINDS:
        name = kind.lower()
        peft_ext.push_to_hub(adapter(kind, 1), f"ann/{name}")
        peft_ext.push_to_hub(adapter(kind, 2), name, revision="branch")
    commit = network(1).push_to_hub("ann/network", license="mit", metrics=[RESULT])
    told["network"] = [type(commit) is CommitInfo, str(commit)]
    network(2).push_to_hub("network", revision="branch")

    def write(repository: str, revision: str, text: str) -> None:
        card = ModelCard(Path(hub.hf_hub_download(repository, "README.md", revision=revision)).read_text())
        card.text += text
        hub.upload_file(
            path_or_fileobj=str(card).encode(), path_in_repo="README.md", repo_id=repository, revision=revision
        )

    card = "---\nlicense: mit\ntags:\n- restaurants\n---\n\n# Before\n\nWords from before.\n"
    hub.create_repo("ann/branches")
    hub.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id="ann/branches")
    peft_ext.push_to_hub(adapter("NOLA", 1), "ann/branches")
    peft_ext.push_to_hub(adapter("NOLA", 2), "ann/branches", revision="two")
    write("ann/branches", "main", "\nWords of main.\n")
    write("ann/branches", "two", "\nWords of two.\n")
    peft_ext.push_to_hub(adapter("NOLA", 3), "ann/branches", revision="two", datasets=["e2e_nlg"], metrics=[RESULT])
    peft_ext.push_to_hub(adapter("NOLA", 4), "ann/branches", create_pr=True, commit_message="Better")

    peft_ext.push_to_hub(adapter("NOLA", 1), "ann/secret", private=True)
    network(1).push_to_hub("ann/secret-network", private=True)

    peft_ext.push_to_hub(several(), "ann/several")
    hub.upload_file(path_or_fileobj=b"words", path_in_repo="tokenizer.json", repo_id="ann/several")
    hub.upload_file(path_or_fileobj=b"numbers", path_in_repo="training_args.bin", repo_id="ann/several")

    adapter("NOLA", 1).push_to_hub("ann/theirs")
    told["theirs"] = Path(hub.hf_hub_download("ann/theirs", "README.md")).read_text()
    peft_ext.push_to_hub(adapter("NOLA", 1), "ann/theirs")
    adapter("NOLA", 1).push_to_hub("ann/theirs")

    settings = {"push_to_hub": True, "save_steps": 1, "hub_always_push": True, "hub_revision": None}
    trained(DescribingTrainer, Path(folder, "one"), hub_model_id="ann/trained", **settings).push_to_hub()
    plain = trained(Trainer, Path(folder, "two"), hub_model_id="ann/plain", **settings)
    plain.push_to_hub()
    told["plain"] = Path(hub.hf_hub_download("ann/plain", "README.md")).read_text()
    peft_ext.push_to_hub(plain.model, "ann/plain")

    told["refused"] = [
        error_of(lambda: peft_ext.push_to_hub(adapter("NOLA"), "bob/nola")),
        error_of(lambda: ModelCard("---\nbase_model: /home/ann/llama\n---\n").validate()),
        error_of(lambda: ModelCard.load("ann/branches").validate()),
    ]
    return told


def load(folder: str) -> dict[str, Any]:
    """Anybody, without a token unless one is given, loads what is there."""
    for kind in KINDS:
        for revision in ("main", "branch"):
            model = PeftModel.from_pretrained(base(kind), f"ann/{kind.lower()}", revision=revision).eval()
            torch.save(logits(model, kind), Path(folder, f"{kind} {revision}.pt"))
    for revision in ("main", "branch"):
        found = peft_ext.load_from_seed("ann/network", revision=revision)
        torch.save(logits(found, "NETWORK"), Path(folder, f"NETWORK {revision}.pt"))
    given = peft_ext.load_from_seed("ann/network", tiny_models.vit())
    model = PeftModel.from_pretrained(base("NOLA"), "ann/several").eval()
    model.load_adapter("ann/several", "other", subfolder="other")
    model.set_adapter("other")
    torch.save(logits(model, "NOLA"), Path(folder, "several.pt"))

    main(["quantize", "ann/several", str(Path(folder, "fewer")), "--dtype", "int8", "--revision", "main"])

    def secret(token: str | None) -> str:
        return error_of(lambda: PeftModel.from_pretrained(base("NOLA"), "ann/secret", token=token))

    def secret_network(token: str | None) -> str:
        return error_of(lambda: peft_ext.load_from_seed("ann/secret-network", token=token))

    return {
        "given": torch.equal(logits(given, "NETWORK"), torch.load(Path(folder, "NETWORK main.pt"))),
        "fewer": sorted(path.name for path in Path(folder, "fewer").iterdir()),
        "secret": [secret(token) for token in (None, "hf_bob", "hf_ann")],
        "secret network": [secret_network(token) for token in (None, "hf_bob", "hf_ann")],
        "no token": error_of(lambda: peft_ext.push_to_hub(adapter("NOLA"), "ann/nola")),
        "missing": error_of(lambda: peft_ext.load_from_seed("ann/nothing")),
        "revision": error_of(lambda: peft_ext.load_from_seed("ann/network", revision="nothing")),
        "no name": error_of(lambda: peft_ext.load_from_seed("ann/no/thing")),
    }


if __name__ == "__main__":
    program, where = sys.argv[1:]
    Path(where, f"{program}.json").write_text(json.dumps({"publish": publish, "load": load}[program](where)))
