"""How far an unlearned model is from one that never saw the forget set.

`observe` runs a model; everything else is a pure function of what it returns. The gold is a model retrained on the
retain set alone: a metric says little without its value for the gold.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.data_loader import DataLoaderStateMixin
from accelerate.utils import gather, send_to_device
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DistributedSampler

# Below as many reference models Carlini et al. (2022) estimate one variance for all samples.
_OWN_VARIANCE = 64
_RESAMPLES = 200


@dataclass
class Outcome:
    """What a model says of n samples, in the order of the loader.

    Attributes:
        losses: `(n,)`, float64: cross-entropy of a sample; language models: mean over its target tokens, in nats.
        correct: `(n,)`, bool: the label is the likeliest class; language models: every target token is the likeliest
            one after the true tokens before it.
        log_probs: `(n, classes)`, float32: logarithms of the predicted distribution; classification only.
        confidence: `(n,)`, float64: log(p / (1 - p)) for the probability p of the label, LiRA's statistic (Carlini et
            al. 2022); language models: p = exp(-loss).
        extraction: `(n,)`, float64: share of the target that follows from the rest, see `observe`; language models.
        truth_ratio: `(n,)`, float64: what `truth_ratio` returns; language models with wrong answers only.

    Raises:
        ValueError: lengths that differ.
    """

    losses: np.ndarray
    correct: np.ndarray
    log_probs: np.ndarray | None
    confidence: np.ndarray
    extraction: np.ndarray | None = None
    truth_ratio: np.ndarray | None = None

    def __post_init__(self) -> None:
        found = {f.name: len(getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) is not None}
        if len(set(found.values())) > 1:
            raise ValueError(f"All fields of an outcome must describe the same samples, got lengths {found}.")

    def __len__(self) -> int:
        return len(self.losses)


def observe(model: nn.Module, loader: Iterable[Mapping[str, Any]]) -> Outcome:
    """Run a classifier or a causal language model over some samples, in evaluation mode and without gradients.

    The extraction strength of a target of L tokens is `1 - k / L` for the smallest k such that all tokens from the k-th
    on are the likeliest ones after the true tokens before them (Carlini et al. 2021, "Extracting training data from
    large language models", as in open-unlearning; where not even the last token is right, it is 0 here).

    Args:
        model: `model(**batch).logits` has shape `(batch, classes)`, or `(batch, length, vocabulary)` with logits for
            the next token.
        loader: Batches with `"labels"` of shape `(batch,)`, or `(batch, length)` with -100 for what is no target. In
            several processes either each process reads the whole, or Accelerate has prepared the loader (of a data set
            that has a length): its processes read a share each, and all of them get the whole.

    Returns:
        The outcome. Where the model's logits are not finite it holds NaN, and the sample is not correct.

    Raises:
        ValueError: no samples, samples without a target, batches without labels, or a loader that was not prepared
            with Accelerate and reads a share.
    """
    if isinstance(getattr(loader, "sampler", None), DistributedSampler) and not isinstance(
        loader, DataLoaderStateMixin
    ):
        raise ValueError(
            "A loader with a DistributedSampler reads a share that cannot be put together again. Use a plain loader in "
            "every process, or one from `Accelerator.prepare`."
        )
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    parts: list[dict[str, np.ndarray]] = []
    try:
        # Not inference mode: weights that an adapter computes here can be kept for later steps.
        with torch.no_grad():
            for batch in loader:
                measured = _gather(_measure(model, send_to_device(dict(batch), device)), loader)
                parts.append({name: tensor.cpu().numpy() for name, tensor in measured.items()})
    finally:
        for module, mode in modes:
            module.training = mode
    if not parts:
        raise ValueError("The loader must have samples, got none.")
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if not whole["targets"].all():
        raise ValueError(
            f"Every sample must have a target, got {int((whole['targets'] == 0).sum())} whose labels are all -100 (the "
            "first token is no target). Was the target cut off? Leave such samples out or allow longer ones."
        )
    losses = whole["losses"].astype(np.float64)
    return Outcome(
        losses, whole["correct"], whole.get("log_probs"), _log_odds(losses), _as_double(whole.get("extraction"))
    )


def _as_double(values: np.ndarray | None) -> np.ndarray | None:
    return None if values is None else values.astype(np.float64)


def _measure(model: nn.Module, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Losses and the like, and numbers of targets, of one batch: a row of each tensor is a sample."""
    if "labels" not in batch:
        raise ValueError(f'Batches must have "labels", got {", ".join(map(repr, batch))}.')
    labels = batch.pop("labels")
    logits = model(**batch).logits
    if logits.ndim == 2:
        losses = _cross_entropy(logits, labels)
        return {
            "losses": losses,
            "correct": (logits.argmax(1) == labels) & losses.isfinite(),
            "log_probs": logits.float().log_softmax(1),
            "targets": torch.ones_like(labels),
        }
    logits, labels = logits[:, :-1], labels[:, 1:]
    is_target = labels != -100
    number = is_target.sum(1)
    chosen = logits[is_target]  # of all positions the targets alone are worth a float32 copy
    tokens = torch.zeros(labels.shape, device=logits.device)
    tokens[is_target] = _cross_entropy(chosen, labels[is_target])
    right = torch.ones_like(is_target)
    right[is_target] = (chosen.argmax(1) == labels[is_target]) & tokens[is_target].isfinite()
    # Right from here to the end.
    tail = right.flip(1).cumprod(1).flip(1) * is_target
    return {
        "losses": tokens.sum(1) / number,
        "correct": right.all(1),
        "extraction": tail.sum(1) / number,
        "targets": number,
    }


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-log softmax(logits)[label] with a small relative error even where p rounds to 1; `(n, c), (n,) -> (n,)`."""
    logits, column = logits.float(), labels[:, None]
    others = logits.scatter(1, column, -math.inf).logsumexp(1)
    return F.softplus(others - logits.gather(1, column)[:, 0])


def _log_odds(losses: np.ndarray) -> np.ndarray:
    """log(p / (1 - p)) for p = exp(-loss)."""
    losses = np.maximum(losses, np.finfo(np.float32).tiny)
    return -losses - np.log(-np.expm1(-losses))


def _gather(tensors: dict[str, torch.Tensor], loader: Any) -> dict[str, torch.Tensor]:
    """The shares of all processes, without the samples that fill up the last batch: Accelerate's `gather_for_metrics`.

    That is a method of `Accelerator`, which a library cannot make without settings that it does not know.
    """
    if not isinstance(loader, DataLoaderStateMixin) or PartialState().num_processes == 1:
        return tensors
    whole = gather({name: tensor.contiguous() for name, tensor in tensors.items()})
    if loader.end_of_dataloader and loader.remainder > 0:
        whole = {name: tensor[: loader.remainder] for name, tensor in whole.items()}
    return whole


def truth_ratio(
    model: nn.Module, loader: Iterable[Mapping[str, Any]], wrong_loader: Iterable[Mapping[str, Any]]
) -> np.ndarray:
    """How likely wrong answers are, relative to the right one (Maini et al. 2024, TOFU), for every sample.

    `mean over wrong answers of P(wrong)^(1/length) / P(right)^(1/length)`: near 0 for what a model knows, near 1 where
    it cannot tell. Maini et al. take a paraphrase for the right answer.

    Args:
        model: A causal language model, see `observe`.
        loader: Questions with the right answers, n samples.
        wrong_loader: The same questions with wrong answers: all those of the first sample, then those of the second.

    Returns:
        Ratios of shape `(n,)`.

    Raises:
        ValueError: samples that have not the same number of wrong answers.
    """
    right, wrong = observe(model, loader).losses, observe(model, wrong_loader).losses
    if len(wrong) % len(right):
        raise ValueError(
            f"Every sample must have as many wrong answers, got {len(wrong)} wrong answers of {len(right)} samples."
        )
    logs = -wrong.reshape(len(right), -1)
    return np.exp(np.logaddexp.reduce(logs, axis=1) - math.log(logs.shape[1]) + right)


def truth_score(ratios: np.ndarray) -> float:
    """TOFU's aggregate for a forget set: mean of min(R, 1/R), at most 1, where right and wrong are as likely."""
    with np.errstate(divide="ignore"):
        return float(np.minimum(ratios, 1 / ratios).mean())


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> float:
    """Mean Jensen-Shannon divergence in nats, from 0 to log 2 (Lin 1991; as in Chundawat et al. 2023).

    Args:
        p: Log-probabilities of shape `(n, classes)`.
        q: Those of another model for the same samples.

    Raises:
        ValueError: shapes that differ, or what are no log-probabilities.
    """
    p, q = _distributions(p, q)
    middle = np.logaddexp(p, q) - math.log(2)

    def divergence(logs: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):  # 0 log 0 is 0
            return np.where(np.isneginf(logs), 0, np.exp(logs) * (logs - middle)).sum(1)

    return float(np.mean((divergence(p) + divergence(q)) / 2))


def activation_distance(p: np.ndarray, q: np.ndarray) -> float:
    """Mean Euclidean distance of predicted distributions (Golatkar et al. 2021, "Mixed-privacy forgetting").

    Takes and raises the same as `jensen_shannon`.
    """
    p, q = _distributions(p, q)
    return float(np.linalg.norm(np.exp(p) - np.exp(q), axis=1).mean())


def l1(p: np.ndarray, q: np.ndarray) -> float:
    """Mean L1 distance of predicted distributions, twice their total variation: from 0 to 2.

    Takes and raises the same as `jensen_shannon`.
    """
    p, q = _distributions(p, q)
    return float(np.abs(np.exp(p) - np.exp(q)).sum(1).mean())


def _distributions(p: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    if p.ndim != 2 or p.shape != q.shape:
        raise ValueError(f"Log-probabilities of the same samples must have one shape (n, c), got {p.shape}, {q.shape}.")
    for logs in (p, q):
        error = np.abs(np.exp(logs).sum(1) - 1).max()
        if error > 1e-3:
            raise ValueError(
                f"Log-probabilities must be those of distributions, got sums that are off by {error:.2g}. "
                "Probabilities and logits must be made log-probabilities first."
            )
    return p, q


def tug_of_war(accuracies: Sequence[float], gold_accuracies: Sequence[float]) -> float:
    """prod (1 - |accuracy - gold's|): 1 like the gold, lower otherwise.

    From Zhao et al. 2024, "What makes unlearning hard and what to do about it".

    Args:
        accuracies: Shares (0 to 1) on the forget, the retain and the test set.
        gold_accuracies: The gold's, in the same order.
    """
    return float(np.prod(1 - np.abs(np.subtract(accuracies, gold_accuracies))))


def membership_attack(members: Outcome, non_members: Outcome, target: Outcome) -> float:
    """SalUn's MIA efficacy: the share of forget samples that an attacker takes for non-members.

    One threshold on the confidence for all samples, which separates retain from test samples (Jia et al. 2023, "Model
    sparsity can simplify machine unlearning", appendix C.3; Fan et al. 2024). The attacker is a logistic regression
    with balanced classes here, theirs a support vector machine on probabilities. High values are no merit: compare
    with the gold's.

    Args:
        members: Of the retain set.
        non_members: Of the test set.
        target: Of the forget set.

    Returns:
        The share, or NaN if outputs of the model are not finite.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    values = np.concatenate([members.confidence, non_members.confidence])[:, None]
    if not (np.isfinite(values).all() and np.isfinite(target.confidence).all()):
        return math.nan
    is_member = np.repeat([True, False], [len(members), len(non_members)])
    attacker = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced")).fit(values, is_member)
    return float(np.mean(~attacker.predict(target.confidence[:, None])))


def population_attack(target: Outcome, non_members: Outcome) -> float:
    """How well one threshold on the confidence tells the forget set from data never seen: cross-validated AUC.

    A logistic regression that is told which samples are which, as in the NeurIPS 2023 unlearning challenge's starting
    kit (on losses, there with accuracies). It learns the direction: forgetting too much shows as forgetting too little.

    Returns:
        The mean area under the ROC curve over five folds: 0.5 if they cannot be told apart. NaN if outputs of the model
        are not finite, or with one sample.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    values = np.concatenate([target.confidence, non_members.confidence])[:, None]
    folds = min(5, len(target), len(non_members))
    if folds < 2 or not np.isfinite(values).all():
        return math.nan
    is_target = np.repeat([True, False], [len(target), len(non_members)])
    attacker = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced"))
    split = StratifiedKFold(folds, shuffle=True, random_state=0)
    return float(cross_val_score(attacker, values, is_target, cv=split, scoring="roc_auc").mean())


@dataclass
class Attack:
    """How well members are told from non-members; without any signal `auc` is 0.5 and `tpr` the false positives' rate.

    Attributes:
        auc: Area under the ROC curve. Below 0.5: members look less like members than samples never seen do.
        auc_error: Its standard error for so many samples (Hanley and McNeil 1982).
        tpr: True positives at 1 % false positives.
        tpr_error: Its standard error, from resampled members and non-members.
    """

    auc: float
    auc_error: float
    tpr: float
    tpr_error: float


def per_example_attack(
    forget: Outcome, heldout: Outcome, references: Sequence[tuple[Outcome, Outcome]], false_positives: float = 0.01
) -> Attack:
    """The offline likelihood ratio attack, LiRA (Carlini et al. 2022, "Membership inference attacks from first
    principles"; for unlearning Hayes et al. 2024, "Inexact unlearning needs more careful evaluations").

    A sample's score is the confidence of the attacked model, standardised by the mean and deviation of the confidence
    of models that never saw that sample: hard samples are compared with themselves. The deviation is one for all
    samples if there are fewer than 64 such models.

    Args:
        forget: Of the forget set, the members if nothing was forgotten.
        heldout: Of samples that neither model saw; best of the same kind as those to forget.
        references: Outcomes on both sets of models trained on neither. Leave out the attacked model itself.
        false_positives: Rate at which the true positives are counted.

    Returns:
        The attack's success. NaN if outputs of a model are not finite.

    Raises:
        ValueError: no references, or of other samples.
    """
    from sklearn.metrics import roc_auc_score

    if not references:
        raise ValueError("The attack must have one reference model that was trained on neither set, got none.")
    for pair in references:
        if [len(outcome) for outcome in pair] != [len(forget), len(heldout)]:
            raise ValueError(
                f"Reference models must be observed on the same {len(forget)} and {len(heldout)} samples as the "
                f"attacked model, got {len(pair[0])} and {len(pair[1])}."
            )
    n = len(forget)
    # (models, samples of both sets)
    seen = np.stack([np.concatenate([outcome.confidence for outcome in pair]) for pair in references])
    scores = np.concatenate([forget.confidence, heldout.confidence]) - seen.mean(0)
    if not np.isfinite(scores).all():
        return Attack(math.nan, math.nan, math.nan, math.nan)
    if len(references) > 1:
        variances = seen.var(0, ddof=1)
        scale = np.sqrt(variances if len(references) >= _OWN_VARIANCE else variances.mean())
        scores = scores / np.maximum(scale, np.finfo(np.float64).eps)
    auc = float(roc_auc_score(np.arange(len(scores)) < n, scores))
    tpr, tpr_error = _true_positives(scores[:n], scores[n:], false_positives)
    return Attack(auc, _auc_error(auc, n, len(heldout)), tpr, tpr_error)


def _auc_error(auc: float, members: int, others: int) -> float:
    one, two = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (members - 1) * (one - auc**2) + (others - 1) * (two - auc**2)
    return math.sqrt(max(variance, 0) / (members * others))


def _true_positives(members: np.ndarray, others: np.ndarray, rate: float) -> tuple[float, float]:
    """The share of members above all but a share `rate` of the others, and its standard error."""
    allowed = int(rate * len(others))

    def share(members: np.ndarray, others: np.ndarray) -> float:
        return float(np.mean(members > np.sort(others)[-1 - allowed]))

    random = np.random.default_rng(0)
    resampled = [
        share(random.choice(members, len(members)), random.choice(others, len(others))) for _ in range(_RESAMPLES)
    ]
    found = share(members, others)
    # Resampling says 0 where no member, or every one, is above; Agresti and Coull's two more of each do not.
    adjusted = (found * len(members) + 2) / (len(members) + 4)
    floor = math.sqrt(adjusted * (1 - adjusted) / (len(members) + 4))
    return found, max(float(np.std(resampled, ddof=1)), floor)
