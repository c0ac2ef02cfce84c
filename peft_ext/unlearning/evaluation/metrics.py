"""Metrics of how far an unlearned model is from one that never saw the forget set.

`observe` runs a model; everything else is a pure function of what it returns. The gold is a model retrained on the
retain set alone: a metric says little without its value for the gold. What is for language models alone is in
`language`.
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

from ...targets import IGNORED, Alignment

# With fewer reference models than this, Carlini et al. (2022) estimate one variance for all samples.
_OWN_VARIANCE = 64
_RESAMPLES = 200
_MIN_K = 0.4  # as open-unlearning has it for TOFU
_OF_TOKENS = ("extraction", "memorised", "min_k")


@dataclass
class Outcome:
    """Holds what a model says of n samples, in the order of the loader.

    A sample has one target (classifiers of images, texts and the like) or several target tokens (all other models).

    Attributes:
        losses: `(n,)`, float64, cross-entropy of a sample in nats; the mean over its target tokens if it has several.
        correct: `(n,)`, bool, whether the label is the likeliest class, or every target token the likeliest one at
            its place.
        log_probs: `(n, classes)`, float32, logarithms of the predicted distribution; for one target a sample only.
        confidence: `(n,)`, float64, log(p / (1 - p)) for the probability p of the label, the statistic of LiRA
            (Carlini et al. 2022); of several target tokens p is exp(-loss), the geometric mean.
        extraction: `(n,)`, float64, the extraction strength that `observe` describes; for target tokens only.
        truth_ratio: `(n,)`, float64, what `language.truth_ratio` returns; for language models with wrong answers only.
        memorised: `(n,)`, float64, the share of the target tokens that are the likeliest ones at their places: exact
            memorisation. For target tokens only, as `min_k`.
        min_k: `(n,)`, float64, the mean loss of the 40 % of the target tokens that the model expects least, the
            statistic of Min-K% Prob (Shi et al. 2024, "Detecting pretraining data from large language models").
        paraphrase: `(n,)`, float64, the loss of another wording of the answer; for questions with such alone, as the
            next ones.
        wrong: `(n, k)`, float64, the losses of k wrong answers.
        rouge: `(n,)`, float64, how much of the answer is in what the model writes, ROUGE-L recall from 0 to 1; NaN
            where nothing was written.

    Raises:
        ValueError: the lengths differ.
    """

    losses: np.ndarray
    correct: np.ndarray
    log_probs: np.ndarray | None
    confidence: np.ndarray
    extraction: np.ndarray | None = None
    truth_ratio: np.ndarray | None = None
    memorised: np.ndarray | None = None
    min_k: np.ndarray | None = None
    paraphrase: np.ndarray | None = None
    wrong: np.ndarray | None = None
    rouge: np.ndarray | None = None

    def __post_init__(self) -> None:
        found = {f.name: len(getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) is not None}
        if len(set(found.values())) > 1:
            raise ValueError(f"All fields of an outcome must describe the same samples, got lengths {found}.")

    def __len__(self) -> int:
        return len(self.losses)


def observe(model: nn.Module, loader: Iterable[Mapping[str, Any]], last_target: bool = True) -> Outcome:
    """Runs a model over samples, in evaluation mode and without gradients.

    Which outputs belong to which labels, `peft_ext.targets.Alignment` says: for causal language models the output at a
    token belongs to the label of the next one, for token classifiers, masked language models and encoder-decoders to
    the label at the same place.

    The extraction strength of L target tokens is `1 - k / L` for the smallest k such that all of them from the k-th on,
    counted from 0, are the likeliest ones at their places (Carlini et al. 2021, "Extracting training data from large
    language models", as in open-unlearning; where not even the last token is right, it is 0 here). Causal language
    models and decoders know the true tokens before a place: it is the share of the target that they write once the
    rest is given. Token classifiers and masked language models see the whole input at every place, and nothing is
    extracted: it is the share of the targets in the unbroken run of right ones at the end.

    Args:
        model: a model of one of these kinds, or a classifier of samples; `model(**batch).logits` has shape
            `(batch, classes)` for labels of shape `(batch,)`, or `(batch, length, classes)` for `(batch, length)`.
        loader: batches with `"labels"` of shape `(batch,)`, or `(batch, length)` with -100 for what is no target, and
            for an encoder-decoder with `"decoder_input_ids"`. In several processes either each process reads the
            whole, or Accelerate has prepared the loader (of a data set that has a length): then each process reads a
            share, and all of them get the whole.
        last_target: whether `extraction`, `memorised` and `min_k` look at the last of several targets. open-unlearning
            leaves it out there, and only there: it is the end mark of an answer.

    Returns:
        The outcome. Where the model's logits are not finite, it holds NaN and the sample is not correct.

    Raises:
        ValueError: there are no samples, samples have no target, batches have no labels or labels that do not fit the
            model, the model is of another kind, or the loader reads a share and was not prepared with Accelerate.
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
    alignment = Alignment.of(model)
    model.eval()
    parts: list[dict[str, np.ndarray]] = []
    try:
        # Not inference mode: weights that an adapter computes here can be kept for later steps.
        with torch.no_grad():
            for batch in loader:
                measured = _measure(model, alignment, send_to_device(dict(batch), device), last_target)
                measured = _gather(measured, loader)
                parts.append({name: tensor.cpu().numpy() for name, tensor in measured.items()})
    finally:
        for module, mode in modes:
            module.training = mode
    if not parts:
        raise ValueError("The loader must have samples, got none.")
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if not whole["targets"].all():
        raise ValueError(
            f"Every sample must have a target, got {int((whole['targets'] == 0).sum())} whose labels are all -100 (a "
            "causal language model has no target in its first token). Was the target cut off? Leave such samples out "
            "or allow longer ones."
        )
    losses = whole["losses"].astype(np.float64)
    of_tokens = {name: whole[name].astype(np.float64) for name in _OF_TOKENS if name in whole}
    return Outcome(losses, whole["correct"], whole.get("log_probs"), _log_odds(losses), **of_tokens)


def _measure(
    model: nn.Module, alignment: Alignment, batch: Mapping[str, Any], last_target: bool
) -> dict[str, torch.Tensor]:
    """Returns losses and the like, and numbers of targets, of one batch: a row of each tensor is a sample."""
    arguments, labels = alignment.split(batch)
    of_samples = labels.dim() == 1
    logits, labels = alignment.pair(model(**arguments), labels)  # (n, places, classes), (n, places)
    if of_samples:
        logits, labels = logits[:, 0], labels[:, 0]
        losses = _cross_entropy(logits, labels)
        return {
            "losses": losses,
            "correct": (logits.argmax(1) == labels) & losses.isfinite(),
            "log_probs": logits.float().log_softmax(1),
            "targets": torch.ones_like(labels),
        }
    is_target = labels != IGNORED
    number = is_target.sum(1)
    chosen = logits[is_target]  # only the places of targets are worth a float32 copy
    tokens = torch.zeros(labels.shape, device=logits.device)
    tokens[is_target] = _cross_entropy(chosen, labels[is_target])
    right = torch.ones_like(is_target)
    right[is_target] = (chosen.argmax(1) == labels[is_target]) & tokens[is_target].isfinite()
    looked_at = is_target
    if not last_target:
        following = is_target.flip(1).cumsum(1).flip(1)  # targets from a place on
        looked_at = is_target & ((following > 1) | (number == 1)[:, None])
    return {
        "losses": tokens.sum(1) / number,
        "correct": right.all(1),
        **_of_tokens(tokens, right, looked_at),
        "targets": number,
    }


def _of_tokens(tokens: torch.Tensor, right: torch.Tensor, looked_at: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns what `_OF_TOKENS` names for every sample.

    Args:
        tokens: losses of shape `(n, places)`.
        right: whether each is the likeliest one.
        looked_at: which places count.
    """
    number = looked_at.sum(1)
    # A target is in the tail if all targets from it to the end are right.
    tail = (right | ~looked_at).flip(1).cumprod(1).flip(1) * looked_at
    least = (number.double() * _MIN_K).long().clamp(min=1)
    ranked = tokens.masked_fill(~looked_at, 0).sort(1, descending=True).values
    places = torch.arange(tokens.shape[1], device=tokens.device)
    return {
        "extraction": tail.sum(1) / number,
        "memorised": (right & looked_at).sum(1) / number,
        "min_k": ranked.masked_fill(places >= least[:, None], 0).sum(1) / least,
    }


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns -log softmax(logits)[label], with a small relative error even where the probability rounds to 1.

    Args:
        logits: shape `(n, classes)`.
        labels: shape `(n,)`.

    Returns:
        Shape `(n,)`, float32.
    """
    logits, column = logits.float(), labels[:, None]
    others = logits.scatter(1, column, -math.inf).logsumexp(1)
    return F.softplus(others - logits.gather(1, column)[:, 0])


def _log_odds(losses: np.ndarray) -> np.ndarray:
    """Returns log(p / (1 - p)) for p = exp(-loss)."""
    losses = np.maximum(losses, np.finfo(np.float32).tiny)
    return -losses - np.log(-np.expm1(-losses))


def _gather(tensors: dict[str, torch.Tensor], loader: Any) -> dict[str, torch.Tensor]:
    """Returns the shares of all processes, without the samples that fill up the last batch.

    Accelerate does the same in `gather_for_metrics`, but that is a method of `Accelerator`, which a library cannot make
    without settings that it does not know.
    """
    if not isinstance(loader, DataLoaderStateMixin) or PartialState().num_processes == 1:
        return tensors
    whole = gather({name: tensor.contiguous() for name, tensor in tensors.items()})
    if loader.end_of_dataloader and loader.remainder > 0:
        whole = {name: tensor[: loader.remainder] for name, tensor in whole.items()}
    return whole


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> float:
    """Returns the mean Jensen-Shannon divergence in nats, from 0 to log 2 (Lin 1991; as in Chundawat et al. 2023).

    Args:
        p: log-probabilities of one model, shape `(n, classes)`.
        q: those of another model for the same samples, of the same shape.

    Raises:
        ValueError: the shapes differ, or the values are no log-probabilities.
    """
    p, q = _distributions(p, q)
    middle = np.logaddexp(p, q) - math.log(2)

    def divergence(logs: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):  # 0 log 0 is 0
            return np.where(np.isneginf(logs), 0, np.exp(logs) * (logs - middle)).sum(1)

    return float(np.mean((divergence(p) + divergence(q)) / 2))


def activation_distance(p: np.ndarray, q: np.ndarray) -> float:
    """Returns the mean Euclidean distance of predicted distributions.

    It comes from Golatkar et al. 2021, "Mixed-privacy forgetting in deep networks". Its arguments and errors are those
    of `jensen_shannon`.
    """
    p, q = _distributions(p, q)
    return float(np.linalg.norm(np.exp(p) - np.exp(q), axis=1).mean())


def l1(p: np.ndarray, q: np.ndarray) -> float:
    """Returns the mean L1 distance of predicted distributions, twice their total variation, from 0 to 2.

    Its arguments and errors are those of `jensen_shannon`.
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
    """Returns the product of 1 - |accuracy - gold's accuracy| over sets: 1 for the gold's accuracies, less for others.

    It comes from Zhao et al. 2024, "What makes unlearning hard and what to do about it".

    Args:
        accuracies: shares (0 to 1) on the forget, the retain and the test set.
        gold_accuracies: the shares of the gold, in the same order.
    """
    return float(np.prod(1 - np.abs(np.subtract(accuracies, gold_accuracies))))


def membership_attack(members: Outcome, non_members: Outcome, target: Outcome) -> float:
    """Returns the share of forget samples that an attacker takes for non-members, which SalUn calls MIA efficacy.

    The attacker has one threshold on the confidence for all samples, which separates retain from test samples (Jia et
    al. 2023, "Model sparsity can simplify machine unlearning", appendix C.3; Fan et al. 2024). It is a logistic
    regression with balanced classes here; theirs is a support vector machine on probabilities. High values are no
    merit: they should be compared with the gold's.

    Args:
        members: the outcome on the retain set.
        non_members: the outcome on the test set.
        target: the outcome on the forget set.

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
    """Returns how well one threshold on the confidence tells the forget set from data never seen: cross-validated AUC.

    The attacker is a logistic regression that is told which samples are which, as in the starting kit of the NeurIPS
    2023 unlearning challenge (which attacks losses and counts accuracies). It learns the direction: forgetting too much
    shows as forgetting too little.

    Args:
        target: the outcome on the forget set.
        non_members: the outcome on samples never seen.

    Returns:
        The mean area under the ROC curve over five folds: 0.5 if the sets cannot be told apart. It is NaN if outputs of
        the model are not finite, or if a set has a single sample.
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
    """Says how well members are told from non-members.

    Without any signal `auc` is 0.5 and `tpr` is the rate of false positives.

    Attributes:
        auc: the area under the ROC curve. Below 0.5, members look less like members than samples never seen do.
        auc_error: the standard error of `auc` for so many samples (Hanley and McNeil 1982).
        tpr: the rate of true positives at 1 % false positives.
        tpr_error: the standard error of `tpr`, from resampled members and non-members.
    """

    auc: float
    auc_error: float
    tpr: float
    tpr_error: float


def per_example_attack(
    forget: Outcome, heldout: Outcome, references: Sequence[tuple[Outcome, Outcome]], false_positives: float = 0.01
) -> Attack:
    """Runs the offline likelihood ratio attack, LiRA.

    It comes from Carlini et al. 2022, "Membership inference attacks from first principles", and for unlearning from
    Hayes et al. 2024, "Inexact unlearning needs more careful evaluations".

    A sample's score is the confidence of the attacked model, standardised by the mean and deviation of the confidence
    of models that never saw that sample: hard samples are compared with themselves. The deviation is one for all
    samples if there are fewer than 64 such models.

    Args:
        forget: the attacked model's outcome on the forget set: its members, if nothing was forgotten.
        heldout: its outcome on samples that no model saw, at best of the same kind as those to forget.
        references: for every model trained on neither set, its outcomes on the two; the attacked model itself is not
            among them.
        false_positives: the rate of false positives at which true ones are counted.

    Returns:
        The success of the attack, all NaN if outputs of a model are not finite.

    Raises:
        ValueError: there are no references, or they are about other samples.
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
    # The shape is (models, samples of both sets).
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
    """Returns the share of members above all but a share `rate` of the others, and its standard error."""
    allowed = int(rate * len(others))

    def share(members: np.ndarray, others: np.ndarray) -> float:
        return float(np.mean(members > np.sort(others)[-1 - allowed]))

    random = np.random.default_rng(0)
    resampled = [
        share(random.choice(members, len(members)), random.choice(others, len(others))) for _ in range(_RESAMPLES)
    ]
    found = share(members, others)
    # Resampling gives an error of 0 where no member, or every one, is above; with two more of each, as Agresti and
    # Coull add them, the error is not 0.
    adjusted = (found * len(members) + 2) / (len(members) + 4)
    floor = math.sqrt(adjusted * (1 - adjusted) / (len(members) + 4))
    return found, max(float(np.std(resampled, ddof=1)), floor)
