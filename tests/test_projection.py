"""Training that leaves some directions alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments, default_data_collator

from peft_ext.training.callbacks import trainable_parameters
from peft_ext.training.projection import Projection, ProjectUpdates


def rows(count: int = 4, size: int = 7) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("count", [4, 7])
def test_rows_and_their_matrix_are_projected_away_alike(count: int) -> None:
    R = torch.cat((rows(3), rows(count)[:count]))[:count] if count == 4 else rows(7)
    R[-1] = R[0]  # fewer directions than rows
    by_rows, by_matrix = Projection(R, 1.0), Projection(R.T @ R, 1.0, symmetric=True)
    vector = rows(1)[0] + 1
    torch.testing.assert_close(by_rows(vector), by_matrix(vector))
    assert float((R @ by_rows(vector)).abs().max()) < 1e-10 < float(by_rows(vector).norm())
    basis = by_rows.basis
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]).double())


def test_the_share_of_the_energy_decides_how_many_directions_are_protected() -> None:
    R = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]).double().sqrt())
    for energy, directions in ((0.4, 1), (0.5, 1), (0.51, 2), (0.84, 3), (1.0, 3)):
        assert Projection(R, energy).basis.shape == (4, directions)


def test_further_directions_come_beside_the_known_ones() -> None:
    first, second = rows(3), torch.cat((rows(3), torch.eye(7).double()[:1]))
    known = Projection(first, 1.0)
    both = Projection(second, 1.0, beside=known)
    assert torch.equal(both.basis[:, :3], known.basis) and both.basis.shape == (7, 4)
    torch.testing.assert_close(both.basis.T @ both.basis, torch.eye(4).double())
    vector = rows(1)[0] + 1
    torch.testing.assert_close(both(vector), Projection(second, 1.0)(vector))
    by_matrix = Projection(second.T @ second, 1.0, symmetric=True, beside=known)
    torch.testing.assert_close(by_matrix(vector), both(vector))
    # What is known already holds a share: nothing is added for one that is no larger.
    share = float((second @ known.basis).square().sum() / second.square().sum())
    assert Projection(second, share - 1e-6, beside=known).basis.shape == (7, 3)
    assert Projection(second, share + 1e-6, beside=known).basis.shape == (7, 4)


def test_rows_that_are_almost_known_add_directions_that_are_not() -> None:
    known = Projection(rows(3), 1.0)
    nearly = rows(3) + 1e-5 * torch.randn(3, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    basis = Projection(nearly, 1.0, beside=known).basis
    assert basis.shape[1] > 3
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]).double(), atol=1e-13, rtol=0)


def test_a_bound_on_what_is_added() -> None:
    known = Projection(rows(2), 1.0, components=1)
    assert known.basis.shape == (7, 1) and Projection(rows(4), 1.0, components=2, beside=known).basis.shape == (7, 3)
    with pytest.raises(ValueError, match="`components` must be less than the 7 numbers of a vector, got 7"):
        Projection(rows(), 1.0, components=7)
    with pytest.raises(ValueError, match="All 7 directions would be protected.*or `components`"):
        Projection(torch.eye(7), 1.0, components=6, beside=known)


def test_what_cannot_be_protected_is_refused() -> None:
    with pytest.raises(ValueError, match="All 3 directions would be protected.*lower `energy`, of which 1 is asked"):
        Projection(torch.eye(3), 1.0)
    with pytest.raises(ValueError, match="nothing to protect: the matrix of what to keep is zero"):
        Projection(torch.zeros(2, 3), 0.9)
    with pytest.raises(ValueError, match="`energy` must be a number above 0 and at most 1, got 0"):
        Projection(torch.eye(3), 0)
    with pytest.raises(ValueError, match="The projection is one of 7 numbers; 9 are trained"):
        ProjectUpdates(trainable_parameters(nn.Linear(2, 3)), Projection(rows(), 1.0))


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(2, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.linear(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_an_optimizer_that_scales_every_coordinate_does_not_leave_the_space(tmp_path: Path) -> None:
    """AdamW with weight decay: projected gradients alone would move along the protected rows."""
    R, model = rows(4, 9), Linear()
    data = [{"x": torch.tensor([1.0, i]), "labels": i % 3} for i in range(6)]
    before = torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()])
    training = TrainingArguments(
        output_dir=str(tmp_path), max_steps=5, learning_rate=0.1, weight_decay=0.1, use_cpu=True, report_to=[],
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    callback = ProjectUpdates(trainable_parameters(model), Projection(R, 1.0))
    Trainer(model, training, default_data_collator, data, callbacks=[callback]).train()  # type: ignore[arg-type]
    step = torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()]) - before
    assert float(step.norm()) > 0.3
    assert float((R @ step).abs().max()) < 1e-5
