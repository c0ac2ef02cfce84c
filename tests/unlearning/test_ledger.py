"""The ledger: deletion requests without retain data, in any order, and whatever breaks off."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path

import problems
import pytest
import tiny_models
import torch
from peft import LoraConfig, PeftModel
from problems import PROBLEMS, images, loader, matrix, ridge_solution, trained
from torch import nn

from peft_ext import NolaConfig
from peft_ext.unlearning import UnlearningLedger
from peft_ext.unlearning.derivatives.data import sample_keys
from peft_ext.unlearning.derivatives.function import AdapterFunction
from peft_ext.unlearning.derivatives.losses import CrossEntropy
from peft_ext.unlearning.ledger_fingerprint import fingerprint
from peft_ext.unlearning.ledger_trials import _chosen


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def linear() -> nn.Module:
    torch.manual_seed(1)
    return problems.Regression().double()


@pytest.mark.parametrize("draws", [None, 3])
def test_requests_are_exact_for_a_linear_model(tmp_path, draws):
    """Trained to the optimum with a ridge, taking samples off gives the optimum without them."""
    model, rows = linear(), images(12, 1, (4,))
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    options = {"loss": "squared_error", "ridge": 0.2, "reference": initial, "draws": draws}
    reference = matrix(model)
    solution, gold = (ridge_solution(part, reference, 0.2, 1 / len(part)) for part in (rows, rows[:8]))
    with torch.no_grad():
        model.linear.weight.copy_(solution[:, :-1])
        model.linear.bias.copy_(solution[:, -1])
    distance = float((solution - gold).norm())
    assert distance > 1e-2
    ledger = UnlearningLedger.create(tmp_path, model, loader(rows), damping=1e-12, **options)
    assert len(ledger) == 12
    deletion = ledger.forget(model, loader(rows[8:]))
    assert len(ledger) == 8
    assert deletion.samples == 4
    assert deletion.shift == pytest.approx(distance, rel=1e-6)
    assert torch.allclose(matrix(model), gold, atol=1e-8)


@pytest.mark.parametrize("draws", [3, None])
@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        ("ViT, NOLA and head", torch.float64, 1e-9),
        ("CNN, batch-norm", torch.float64, 1e-9),
        ("GPT-2, NOLA", torch.float64, 1e-9),
        ("ViT, NOLA and head", torch.float32, 1e-6),
    ],
)
def test_the_order_of_requests_does_not_matter(name, dtype, tolerance, draws, tmp_path):
    make, samples = PROBLEMS[name]
    rows = [{k: v.to(dtype) if v.is_floating_point() else v for k, v in row.items()} for row in samples(10, 1)]
    found = []
    for i, requests in enumerate([[rows[:2], rows[2:3], rows[5:7]], [rows[5:7], rows[:3]], [rows[:3] + rows[5:7]]]):
        model = make().to(dtype)
        UnlearningLedger.create(tmp_path / str(i), model, loader(rows), damping=0.1, draws=draws)
        for request in requests:
            # Opened again every time; single precision rounds otherwise in batches of other sizes.
            UnlearningLedger(tmp_path / str(i)).forget(model, loader(request, 1))
        found.append(weights(model))
        assert len(UnlearningLedger(tmp_path / str(i)).requests) == len(requests)
    assert torch.allclose(found[0], found[1], rtol=tolerance, atol=tolerance)
    assert torch.allclose(found[0], found[2], rtol=tolerance, atol=tolerance)
    assert (found[0] - weights(make().to(dtype))).norm() > 1e-3


@pytest.mark.parametrize("known", [True, False])
def test_no_request_leads_further_than_the_training_did(tmp_path, known):
    model, initial, retain, forget = trained(steps=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    reference = initial if known else None
    ledger = UnlearningLedger.create(tmp_path, model, loader(retain + forget), damping=1e-7, reference=reference)
    deletion = ledger.forget(model, loader(forget))
    most = sum(float((value - known * initial[name]).square().sum()) for name, value in before.items()) ** 0.5
    assert deletion.shift == pytest.approx(most, rel=1e-6)  # without a bound it is hundreds of times as long


def test_a_request_raises_the_loss_on_what_is_forgotten(tmp_path):
    model, initial, retain, forget = trained()

    def losses() -> list[float]:
        function = AdapterFunction(model, CrossEntropy())
        return [loss / n for loss, n, _ in map(function.loss_and_gradient, (loader(retain), loader(forget)))]

    before = losses()
    options = {"draws": None, "ridge": 0.01, "reference": initial}
    ledger = UnlearningLedger.create(tmp_path, model, loader(retain + forget), damping=0.01, **options)
    ledger.forget(model, loader(forget))
    after = losses()
    assert after[1] > before[1] + 0.5
    assert after[0] - before[0] < 0.25 * (after[1] - before[1])


def test_damping_is_the_smallest_that_trial_deletions_allow(tmp_path):
    model, initial, retain, forget = trained()
    rows, before = retain + forget, weights(model)
    options = {"ridge": 0.01, "reference": initial}

    def create(name: str, **more) -> UnlearningLedger:
        return UnlearningLedger.create(tmp_path / name, model, loader(rows), **options, **more)

    chosen = {tolerance: create(str(tolerance), retain_tolerance=tolerance).damping for tolerance in (0.0, 0.05, 10.0)}
    assert torch.equal(weights(model), before)
    assert 10 >= chosen[0.0] > chosen[0.05] > chosen[10.0] == 0.03
    assert UnlearningLedger(tmp_path / "0.05").damping == chosen[0.05]

    keys = sample_keys(loader(rows))
    trials, classes = _chosen(loader(rows), keys)
    tenth, most = trials.values()
    assert len(tenth) == 3 and len(most) == 8 and len({int(rows[keys.index(key)]["labels"]) for key in most}) == 1

    def raised(damping: float) -> list[float]:
        """By how much the loss of the rest rises when the trial deletions are made."""
        found = []
        for i, trial in enumerate((tenth, most)):
            gone, rest = ([row for row, key in zip(rows, keys) if (key in trial) == inside] for inside in (True, False))
            ledger = create(f"{damping} {i}", damping=damping)
            function = AdapterFunction(model, CrossEntropy())
            losses = [function.loss_and_gradient(loader(rest))[0] / len(rest)]
            ledger.forget(model, loader(gone))
            losses.append(function.loss_and_gradient(loader(rest))[0] / len(rest))
            found.append(losses[1] - losses[0])
            function.vector = before
        return found

    assert max(raised(chosen[0.05])) <= 0.05
    assert max(raised(0.1)) > 0.05
    assert chosen[0.05] == 0.3  # the one after 0.1


def test_a_ledger_that_would_damage_the_model_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("peft_ext.unlearning.ledger_trials.DAMPINGS", (0.03, 0.1))
    model, initial, retain, forget = trained()
    with pytest.warns(UserWarning, match="of 24 samples raised the loss of the others by more than 0.05 with every"):
        ledger = UnlearningLedger.create(tmp_path, model, loader(retain + forget), ridge=0.01, reference=initial)
    assert ledger.damping == 0.1


def test_ledgers_without_trials(tmp_path):
    model, rows = linear(), images(9, 1, (4,))
    assert UnlearningLedger.create(tmp_path / "one", model, loader(rows[:1])).damping == 1
    same = [dict(row, labels=torch.tensor(0)) for row in rows]
    assert len(UnlearningLedger.create(tmp_path / "same", model, loader(same))) == 9
    model = problems.language_model()
    assert UnlearningLedger.create(tmp_path / "texts", model, loader(problems.texts(6))).damping == 1


def made(folder: Path) -> tuple[nn.Module, list, UnlearningLedger]:
    model, rows = linear(), images(9, 1, (4,))
    return model, rows, UnlearningLedger.create(folder, model, loader(rows), damping=0.1)


def test_samples_are_not_on_disk(tmp_path):
    model, rows, ledger = made(tmp_path)
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert len(content) > 9 * 32
    for row in rows:
        for kind in (torch.float64, torch.float32):
            assert row["pixel_values"].to(kind).numpy().tobytes() not in content


def test_what_is_forgotten_leaves_no_hash(tmp_path):
    model, rows, ledger = made(tmp_path)
    gone = [bytes.fromhex(key) for key in ledger._state.quadratic.keys]
    ledger.forget(model, loader(rows[:8]))
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert sum(key in content for key in gone) == 1
    names = ["ledger.json", "ledger.lock", "state-000001.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_unknown_samples_are_refused(tmp_path, snapshot):
    model, rows, ledger = made(tmp_path)
    ledger.forget(model, loader(rows[:2]))
    state = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    before = weights(model)
    for request, message in (
        (rows[1:3], "1 of 2 samples were never learned, or are forgotten already"),
        (images(2, 7, (4,)), "2 of 2 samples were never learned"),
        ([rows[4], rows[4]], "1 of 2 samples"),
        (rows[2:], "No sample would remain"),
        ([], "The forget set is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            ledger.forget(model, loader(request) if request else [])
    assert torch.equal(weights(model), before)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == state


def test_a_ledger_of_another_model_is_refused(tmp_path):
    model = problems.classifier()
    rows = images(6)
    ledger = UnlearningLedger.create(tmp_path, model, loader(rows))
    other = problems.classifier()
    with torch.no_grad():
        next(p for p in other.parameters() if not p.requires_grad).add_(1e-3)
    own = ledger._state.fingerprint
    with pytest.raises(
        ValueError, match=f"belongs to another model: its fingerprint is {own}, that of the model is [0-9a-f]"
    ):
        ledger.forget(other, loader(rows[:2]))
    with pytest.raises(ValueError, match="belongs to another model"):
        ledger.restore(other)


LORA = {"target_modules": ["q_proj"], "lora_alpha": 4}


@pytest.mark.parametrize(
    ("config", "other"),
    [
        (NolaConfig(r=2, num_basis=6), NolaConfig(r=2, num_basis=6, seed=1)),
        (NolaConfig(r=2, num_basis=6), NolaConfig(r=2, num_basis=6, alpha=80)),
        (LoraConfig(r=2, **LORA), LoraConfig(r=2, **{**LORA, "lora_alpha": 40})),
        (LoraConfig(r=2, **LORA), LoraConfig(r=2, **LORA, use_rslora=True)),
    ],
)
def test_a_ledger_of_an_adapter_with_other_options_is_refused(config, other, tmp_path):
    """The same numbers mean other weights there."""
    rows = images(4)
    model, another = (problems.classifier(copy.deepcopy(each)) for each in (config, other))
    for (name, p), (same, q) in zip(model.named_parameters(), another.named_parameters(), strict=True):
        assert name == same
        q.data.copy_(p.data)
    ledger = UnlearningLedger.create(tmp_path, model, loader(rows), damping=1)
    before = weights(another)
    for serve in (lambda: ledger.forget(another, loader(rows[:1])), lambda: ledger.restore(another)):
        with pytest.raises(
            ValueError, match=r"belongs to another model.* options of the active adapters \(seed, alpha"
        ):
            serve()
    assert torch.equal(weights(another), before)


@pytest.mark.parametrize("config", [NolaConfig(r=2, num_basis=6, nola_dropout=0.5), LoraConfig(r=2, **LORA)])
def test_what_does_not_change_the_function_may_differ(config, tmp_path):
    rows, model = images(4), problems.classifier(config)
    UnlearningLedger.create(tmp_path / "ledger", model, loader(rows), damping=1).forget(model, loader(rows[:1]))
    model.save_pretrained(tmp_path / "adapter")
    options = {"is_trainable": True, "low_cpu_mem_usage": False}
    again = PeftModel.from_pretrained(tiny_models.vit(), tmp_path / "adapter", **options).double().eval()
    own = again.active_peft_config
    own.base_model_name_or_path, own.revision, own.task_type = "elsewhere", "main", "SEQ_CLS"
    setattr(own, "nola_dropout" if isinstance(own, NolaConfig) else "lora_dropout", 0.1)
    with torch.no_grad():
        for (_, p), (_, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
            q.copy_(p)  # all digits
    UnlearningLedger(tmp_path / "ledger").forget(again, loader(rows[1:2]))


def test_a_ledger_without_options_in_its_fingerprint_is_read(tmp_path, monkeypatch):
    model, rows = problems.classifier(), images(4)
    with monkeypatch.context() as patch:  # as ledgers were written before
        patch.setattr(
            "peft_ext.unlearning.ledger.fingerprint", lambda function, like="": fingerprint(function, "0" * 64)
        )
        UnlearningLedger.create(tmp_path, model, loader(rows), damping=1)
    assert re.fullmatch("[0-9a-f]{64}", UnlearningLedger(tmp_path)._state.fingerprint)
    UnlearningLedger(tmp_path).forget(model, loader(rows[:1]))


def test_an_adapter_that_has_changed_is_refused_and_can_be_restored(tmp_path):
    model, rows, ledger = made(tmp_path)
    old = weights(model)
    ledger.forget(model, loader(rows[:2]))
    new = weights(model)
    assert not torch.equal(old, new)
    lost = linear()  # as if the adapter had not been saved after the request
    with pytest.raises(ValueError, match="other weights than the ledger left it with.*`restore`"):
        ledger.forget(lost, loader(rows[2:4]))
    UnlearningLedger(tmp_path).restore(lost)
    assert torch.equal(weights(lost), new)


class Crash(BaseException):
    pass


def test_a_crash_between_any_two_writes_leaves_the_old_or_the_new_state(tmp_path, monkeypatch):
    """Every call that changes the folder fails once, before it does anything and after."""
    calls: list[str] = []
    crash_at: tuple[int, bool] | None = None

    def watched(name, function):
        def call(*arguments, **options):
            calls.append(name)
            here = crash_at is not None and len(calls) - 1 == crash_at[0]
            if here and not crash_at[1]:
                raise Crash
            result = function(*arguments, **options)
            if here:
                raise Crash
            return result

        return call

    model, rows, ledger = made(tmp_path / "whole")
    old = weights(model)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", watched("replace", os.replace))
        patch.setattr(os, "fsync", watched("fsync", os.fsync))
        patch.setattr(Path, "unlink", watched("unlink", Path.unlink))
        ledger.forget(model, loader(rows[:2]))
        new, number = weights(model), len(calls)
        # What a crash left, the file, its name, and the name in the folder; then the old state goes.
        assert calls == 2 * ["unlink", "fsync", "replace", "fsync"] + ["unlink"]
        outcomes = set()
        for i in range(number):
            for after in (False, True):
                folder = tmp_path / f"{i}{after}"
                model, rows, ledger = made(folder)
                calls.clear()
                crash_at = (i, after)
                with pytest.raises(Crash):
                    ledger.forget(model, loader(rows[:2]))
                crash_at = None
                found = UnlearningLedger(folder)
                assert len(list(folder.glob("state-*"))) == 1  # what was left is gone
                found.restore(model)
                forgotten = len(found) == 7
                assert torch.equal(weights(model), new if forgotten else old)
                outcomes.add(forgotten)
                if not forgotten:
                    found.forget(model, loader(rows[:2]))
                    assert torch.equal(weights(model), new)
                found.forget(model, loader(rows[2:3]))  # and it goes on
                assert len(list(folder.glob("state-*"))) == 1
        assert outcomes == {False, True}


def test_wrong_arguments(tmp_path):
    model, rows = problems.classifier(), images(6)
    size = AdapterFunction(model, CrossEntropy()).size
    for arguments, message in (
        ({"loss": "hinge"}, "`loss` must be one of"),
        ({"damping": 0}, "`damping` must be above 0"),
        ({"retain_tolerance": -1}, "`retain_tolerance` must be at least 0"),
        ({"draws": 0}, "`draws` must be a positive integer"),
        ({"memory": 1e4}, f"A ledger of {size} parameters and 6 samples needs .* GB, and `memory` allows"),
    ):
        with pytest.raises(ValueError, match=message):
            UnlearningLedger.create(tmp_path, model, loader(rows), **arguments)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="The training set is empty"):
        UnlearningLedger.create(tmp_path, model, [])
    made(tmp_path)
    with pytest.raises(ValueError, match="There is a ledger in .* already"):
        made(tmp_path)
