"""Outliers: samples of none of a classifier's classes, in training and in scores that tell them from the known classes.

A classifier is fine-tuned beside auxiliary outliers. Outlier exposure (Hendrycks et al. 2019, arXiv 1812.04606) asks
for equal probabilities of all classes there. Feature separation (Wu et al., ICLR 2025, arXiv 2405.17816) also turns the
features of outliers, which the last layer reads, away from the rows of its weight, and those of known samples towards
the row of their class, where neural collapse has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.functional import normalize
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback

from ..checks import check_not_negative, check_positive_integer
from ..randomness import check_seed, uniform

OUTLIER = -100
"""The label of outliers, which cross-entropies leave out."""


class HeadPass(NamedTuple):
    """What the last layer of a classifier read and gave.

    Attributes:
        features: what it read, `(samples, dimensions)`.
        logits: what it gave, `(samples, classes)`.
        weight: of the layer, detached, `(classes, dimensions)`.
    """

    features: torch.Tensor
    logits: torch.Tensor
    weight: torch.Tensor

    @property
    def cosines(self) -> torch.Tensor:
        """Cosines of the features with the rows of the weight, float32, `(samples, classes)`."""
        return normalize(self.features.float()) @ normalize(self.weight.float()).T


def outlier_exposure(logits: torch.Tensor) -> torch.Tensor:
    """Returns the mean cross-entropy of samples to equal probabilities of all classes.

    Args:
        logits: of outliers, `(samples, classes)`.
    """
    return (logits.logsumexp(-1) - logits.mean(-1)).mean()


def separation(cosines: torch.Tensor) -> torch.Tensor:
    """Returns the mean over samples of the sum over classes of `|cos|`.

    Args:
        cosines: of outliers with the rows of the last layer, `(samples, classes)`.
    """
    return cosines.abs().sum(-1).mean()


def clustering(cosines: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns minus the mean cosine of samples with the row of their class.

    Args:
        cosines: of known samples with the rows of the last layer, `(samples, classes)`.
        labels: their classes, `(samples,)`.
    """
    return -cosines.gather(-1, labels[:, None]).mean()


@dataclass(frozen=True)
class OutlierLoss:
    """What is added to a classifier's loss: a weighted sum of three terms, each with its published weight.

    The last layer is trained by the classifier's own loss and by outlier exposure. The rows in the other terms are
    detached: they train what makes the features.

    Attributes:
        exposure: weight of `outlier_exposure`.
        separation: weight of `separation`.
        clustering: weight of `clustering`.

    Raises:
        ValueError: a weight is negative, or all are 0.
    """

    exposure: float = 0.5
    separation: float = 1.0
    clustering: float = 1.0

    def __post_init__(self) -> None:
        for name in ("exposure", "separation", "clustering"):
            check_not_negative(name, getattr(self, name))
        if not (self.needs_outliers or self.needs_features):
            raise ValueError("One of `exposure`, `separation` and `clustering` must be above 0, got 0 for all.")

    @property
    def needs_outliers(self) -> bool:
        """Whether there must be outliers in a batch."""
        return self.exposure > 0 or self.separation > 0

    @property
    def needs_features(self) -> bool:
        """Whether features must depend on what is trained."""
        return self.separation > 0 or self.clustering > 0

    def __call__(self, found: HeadPass, labels: torch.Tensor) -> torch.Tensor:
        """Returns the sum for a batch.

        Args:
            found: of the batch.
            labels: classes, and `OUTLIER` for outliers, `(samples,)`.

        Raises:
            ValueError: the batch has no known samples or lacks outliers, is not one of whole samples, or its features
                depend on nothing that is trained.
        """
        if found.logits.dim() != 2 or len(found.logits) != len(labels):
            raise ValueError(
                f"The last layer gave logits of shape {tuple(found.logits.shape)} for {len(labels)} labels. Outliers "
                "are for classifiers of whole samples, whose last layer is called once a batch, in one process a GPU."
            )
        known = labels != OUTLIER
        if not known.any():
            raise ValueError("All samples of a batch are outliers. Let `WithOutliers` put them beside known ones.")
        if self.needs_outliers and known.all():
            raise ValueError(
                f"There are no outliers, with the label {OUTLIER}, in a batch. Let `WithOutliers` add some, or set "
                "`exposure` and `separation` to 0."
            )
        total = found.logits.new_zeros((), dtype=torch.float32)
        if self.exposure:
            total = total + self.exposure * outlier_exposure(found.logits[~known].float())
        if self.needs_features:
            if not found.features.requires_grad:
                raise ValueError(
                    "What the last layer reads depends on nothing that is trained, so that `separation` and "
                    "`clustering` change nothing. Train an adapter beside the last layer, or set both to 0."
                )
            cosines = found.cosines
        if self.separation:
            total = total + self.separation * separation(cosines[~known])
        if self.clustering:
            total = total + self.clustering * clustering(cosines[known], labels[known])
        return total


class WithOutliers(Dataset):
    """Known samples, whose batches have outliers behind them.

    Which outliers stand beside a sample is drawn anew in every pass from the seed, the pass and the sample's place: a
    training that is repeated, resumed or run in several processes has the same ones. A `DataLoader` whose batch size is
    n has n known samples and `n * ratio` outliers in a batch.

    Args:
        rows: known samples, dictionaries with `labels`.
        outliers: dictionaries with the same inputs; their labels become `OUTLIER`.
        ratio: outliers for every known sample.
        seed: of the draws, 0 to 2**64 - 1.

    Raises:
        ValueError: there is nothing in one of them, the ratio or the seed is something else, or rows have no `labels`.
    """

    def __init__(self, rows: Any, outliers: Any, ratio: int = 1, seed: int = 0) -> None:
        check_positive_integer("ratio", ratio)
        for name, each in (("rows", rows), ("outliers", outliers)):
            if not isinstance(each, Sized) or not len(each):
                raise ValueError(f"`{name}` must be samples whose number is known, at least one, got {each!r}.")
        self.rows, self.outliers, self.ratio, self.seed = rows, outliers, ratio, check_seed(seed)
        self.epoch = 0
        if "labels" not in rows[0]:
            raise ValueError(f"`rows` must be dictionaries with `labels`, got one with {', '.join(rows[0])}.")

    def set_epoch(self, epoch: int) -> None:
        """Says which pass over the samples comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Returns known samples and, behind them, the outliers beside them."""
        places = [place for index in indices for place in self._drawn(index)]
        return [self.rows[index] for index in indices] + [
            {**self.outliers[place], "labels": OUTLIER} for place in places
        ]

    def _drawn(self, index: int) -> list[int]:
        drawn = uniform(self.seed, ("outliers", self.epoch, index), self.ratio).double()
        return ((drawn + 1) / 2 * len(self.outliers)).long().tolist()


class _Passes(TrainerCallback):
    """Tells a data set the number of the pass, which Accelerate does not in several processes."""

    def __init__(self, rows: WithOutliers) -> None:
        self.rows = rows

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rows.set_epoch(int(state.epoch))


class OutlierTrainer(Trainer):
    """A Trainer of a classifier that adds an `OutlierLoss`; evaluations are without it.

    Batches are of `per_device_train_batch_size` known samples and `ratio` times as many outliers, in one pass through
    the model, whose own loss must leave out labels of -100, as those of transformers do.

    Args:
        *args, **kwargs: as for a `Trainer`.
        head: name of the last layer in the model, without what PEFT adds to it, such as `"classifier"`.
        outlier_loss: what is added.
        outliers: auxiliary outliers, dictionaries of the model's inputs; none if the loss needs none.
        ratio: outliers for every known sample.

    Raises:
        ValueError: the head is no linear layer; outliers are missing, empty or not needed, or workers would draw the
            same ones in every pass.
    """

    def __init__(
        self, *args: Any, head: str, outlier_loss: OutlierLoss, outliers: Any = None, ratio: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.head, self.outlier_loss = head, outlier_loss
        self.model_accepts_loss_kwargs = False  # all terms are means over a batch, and so its own loss has to be
        linear_head(self.model, head)  # type: ignore[arg-type]
        if outlier_loss.needs_outliers != (outliers is not None):
            needed = "needs" if outlier_loss.needs_outliers else "has no use for"
            raise ValueError(
                f"`outliers` must be given if and only if the loss needs some: {outlier_loss} {needed} them."
            )
        check_positive_integer("ratio", ratio)
        if outliers is not None:
            if self.args.dataloader_persistent_workers:
                raise ValueError(
                    "`dataloader_persistent_workers` must be False with `outliers`: workers that stay would draw those "
                    "of the first pass in every pass."
                )
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            self.train_dataset = WithOutliers(self.train_dataset, outliers, ratio, seed)
            self.add_callback(_Passes(self.train_dataset))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        if not torch.is_grad_enabled():
            return super().compute_loss(model, inputs, return_outputs, *args, **kwargs)
        labels = inputs["labels"]
        with reading(self.accelerator.unwrap_model(model), self.head) as passes:
            loss, outputs = super().compute_loss(model, inputs, True, *args, **kwargs)
        loss = loss + self.outlier_loss(passes[-1], labels)
        return (loss, outputs) if return_outputs else loss


def linear_head(model: nn.Module, head: str) -> nn.Module:
    """Returns the last layer of a classifier, or what PEFT has put around it.

    Args:
        model: a classifier, with adapters or without.
        head: name of the layer in the base model.

    Raises:
        ValueError: there is none of that name, or it is no linear layer with a weight in floating-point numbers.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    try:
        found = base.get_submodule(head)
    except AttributeError:
        raise ValueError(f"`head` must be the name of a layer of the model, got {head!r}.") from None
    layer: Any = found.original_module if isinstance(found, AuxiliaryTrainingWrapper) else found
    if not isinstance(layer, nn.Linear) or layer.weight.dim() != 2 or not layer.weight.is_floating_point():
        raise ValueError(
            f"`head` must be a linear layer, whose weight has a row for every class, got {head!r}, a "
            f"{type(layer).__name__}. Train the layer whole (`modules_to_save`) instead of adapting or quantizing it."
        )
    return found


@contextmanager
def reading(model: nn.Module, head: str) -> Iterator[list[HeadPass]]:
    """Notes what the last layer of a model reads and gives, until the end of the context.

    Args:
        model: a classifier, with adapters or without.
        head: as for `linear_head`.

    Yields:
        What was noted, a `HeadPass` for every call of the layer.
    """
    passes: list[HeadPass] = []
    layer = linear_head(model, head)

    def note(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        passes.append(HeadPass(args[0], output, module.weight.detach()))

    handle = layer.register_forward_hook(note)
    try:
        yield passes
    finally:
        handle.remove()


@torch.no_grad()
def observe(model: nn.Module, head: str, batches: Iterable[Mapping[str, Any]]) -> HeadPass:
    """Returns what the last layer of a model reads and gives of samples, on the CPU, with the model in evaluation mode.

    Args:
        model: a classifier, with adapters or without.
        head: as for `linear_head`.
        batches: of the model's inputs, on its device.

    Raises:
        ValueError: there is no batch, or the head is no linear layer.
    """
    model.eval()
    found: list[HeadPass] = []
    for batch in batches:
        with reading(model, head) as passes:
            model(**batch)
        found.append(HeadPass(*(tensor.float().cpu() for tensor in passes[-1])))
    if not found:
        raise ValueError("`batches` must hold at least one batch, got none.")
    features, logits = (torch.cat([getattr(each, name) for each in found]) for name in ("features", "logits"))
    return HeadPass(features, logits, found[0].weight)


def softmax_score(found: HeadPass) -> torch.Tensor:
    """Returns the largest probability of every sample (Hendrycks and Gimpel 2017, arXiv 1610.02136), `(samples,)`."""
    return found.logits.softmax(-1).amax(-1)


def energy_score(found: HeadPass) -> torch.Tensor:
    """Returns the logarithm of the sum of the exponentials of the logits, the negative energy, `(samples,)`.

    It is the score of Liu et al. (2020, arXiv 2010.03759) at temperature 1.
    """
    return found.logits.logsumexp(-1)


def cosine_score(found: HeadPass) -> torch.Tensor:
    """Returns the sum over classes of `|cos|` plus the largest probability, `(samples,)`.

    The released code of feature separation scores by this sum.
    """
    return found.cosines.abs().sum(-1) + softmax_score(found)


SCORES: dict[str, Callable[[HeadPass], torch.Tensor]] = {
    "MSP": softmax_score,
    "energy": energy_score,
    "cosine": cosine_score,
}
"""Scores of samples by name: the higher, the likelier one is of a known class."""


class Detection(NamedTuple):
    """How well a score tells outliers from known samples, in percent.

    Attributes:
        auroc: area under the receiver operating characteristic; 50 for chance.
        fpr95: outliers that are taken for known at the threshold at which 95 % of the known samples are.
    """

    auroc: float
    fpr95: float


def detection(known: torch.Tensor, outliers: torch.Tensor) -> Detection:
    """Compares the scores of known samples with those of outliers. It needs scikit-learn.

    Args:
        known, outliers: their scores, `(samples,)` each.

    Returns:
        The areas and rates, NaN if a score is not finite.

    Raises:
        ValueError: there are none of one.
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    if not len(known) or not len(outliers):
        raise ValueError(f"There must be known samples and outliers, got {len(known)} and {len(outliers)}.")
    scores = torch.cat([known, outliers]).double().numpy()
    if not np.isfinite(scores).all():
        return Detection(float("nan"), float("nan"))
    truth = np.arange(len(scores)) < len(known)
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    return Detection(100 * float(roc_auc_score(truth, scores)), 100 * float(false[np.searchsorted(true, 0.95)]))
