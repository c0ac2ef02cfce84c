"""SeededNetwork: whole networks from a seed and coefficients."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peft_ext import McncConfig, NolaConfig, PrancConfig, SeededNetwork, load_from_seed
from peft_ext.randomness import uniform


class Small(nn.Module):
    """Every kind of parameter: convolution, norm, embedding, linear, a free tensor, and a weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.token = nn.Parameter(torch.randn(1, 4))
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3)) + self.token
        return self.second(torch.tanh(self.first(x)))


SIZE = 4 * 2 * 9 + 4 + 4 + 4 + 16 + 4 + 4
CONFIGS = {
    "PRANC": lambda: PrancConfig(num_coefficients=20, seed=3),
    "PRANC, two a weight": lambda: PrancConfig(num_coefficients=20, nnz=2, seed=3),
    "PRANC, dense": lambda: PrancConfig(num_coefficients=20, basis="dense", seed=3),
    "MCNC": lambda: McncConfig(apply_to="weight", k=2, d=30, widths=(8,), seed=3),
}
Config = PrancConfig | McncConfig


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> Config:
    return CONFIGS[request.param]()


def randomize(network: SeededNetwork) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))


def images(batch: int = 5) -> torch.Tensor:
    return torch.randn(batch, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def test_starts_at_weights_from_the_seed(config: Config) -> None:
    weights = SeededNetwork(Small(), config).weights()
    assert list(weights) == [name for name, _ in Small().named_parameters()]
    assert torch.equal(weights["norm.weight"], torch.ones(4)) and torch.equal(weights["first.bias"], torch.zeros(4))
    expected = (uniform(3, ("network", "conv.weight"), 72) * math.sqrt(3 / 18)).view(4, 2, 3, 3)
    torch.testing.assert_close(weights["conv.weight"], expected)
    expected = (uniform(3, ("network", "token"), 4) * 0.02 * math.sqrt(3)).view(1, 4)
    torch.testing.assert_close(weights["token"], expected)


def test_updates_are_those_of_one_generator_over_all_weights(config: Config) -> None:
    network = SeededNetwork(Small(), config)
    start = network.weights()
    randomize(network)
    moved = network.weights()
    spreads = {"conv.weight": 1 / math.sqrt(18), "first.weight": 1 / 2, "token": 0.02}
    flat = torch.cat([((moved[name] - start[name]) / spreads.get(name, 0.1)).flatten() for name in start])
    assert flat.shape == (SIZE,) == (network.generators[0].size,)
    (coefficients,) = network.parameters()
    torch.testing.assert_close(flat, network.generators[0].expand(coefficients.detach()), rtol=1e-4, atol=1e-5)
    assert (flat != 0).float().mean() > 0.9


def test_gradients_against_finite_differences(config: Config) -> None:
    network = SeededNetwork(Small(), config).double()
    randomize(network)
    (coefficients,) = network.parameters()
    loss = lambda: network(images().double()).square().sum()  # noqa: E731
    loss().backward()
    assert coefficients.grad is not None
    for i in (0, 7, len(coefficients) - 1):
        values = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                coefficients[i] += step
                values.append(loss().item())
        with torch.no_grad():
            coefficients[i] += 1e-6
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(coefficients.grad[i].item(), rel=1e-4, abs=1e-6)


def test_only_coefficients_and_buffers_are_state(config: Config) -> None:
    network = SeededNetwork(Small(), config)
    assert len(list(network.parameters())) == 1
    assert set(network.state_dict()) == {
        "_extra_state",
        "coefficients.network",
        "network.norm.running_mean",
        "network.norm.running_var",
        "network.norm.num_batches_tracked",
    }


def test_plain_network(config: Config) -> None:
    network = SeededNetwork(Small(), config)
    randomize(network)
    network(images())  # moves the batch-norm statistics
    network.eval()
    plain = network.to_plain().eval()
    assert torch.equal(plain(images()), network(images()))
    assert plain.first.weight is plain.second.weight
    assert not any(parameter.requires_grad for parameter in plain.parameters())
    randomize(network.train())
    assert sum(parameter.numel() for parameter in plain.parameters()) == SIZE


def test_a_dense_basis_can_be_kept() -> None:
    streamed, kept = (SeededNetwork(Small(), CONFIGS["PRANC, dense"](), keep_basis=keep) for keep in (False, True))
    randomize(streamed)
    randomize(kept)
    for name, weight in streamed.weights().items():
        torch.testing.assert_close(kept.weights()[name], weight, rtol=1e-5, atol=1e-6)
    assert streamed.generators[0].nbytes == 0 and kept.generators[0].nbytes == 4 * 20 * SIZE


def test_copies_are_independent(config: Config) -> None:
    network = SeededNetwork(Small(), config).eval()
    other = copy.deepcopy(network)
    randomize(other)
    assert not torch.equal(other(images()), network(images()))
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(images()), network(images()))


def test_an_error_in_the_network_leaves_it_usable(config: Config) -> None:
    network = SeededNetwork(Small(), config).eval()
    expected = network(images())
    with pytest.raises(RuntimeError):
        network(torch.randn(1, 3, 6, 6))
    assert torch.equal(network(images()), expected)


RELOAD = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from test_seeded_network import Small, images
from peft_ext import load_from_seed
network = load_from_seed({folder!r}, Small())
torch.save((network(images()), network.state_dict()), {output!r})
"""


def test_equal_to_the_bit_in_a_new_process(config: Config, tmp_path: Path) -> None:
    network = SeededNetwork(Small(), config)
    optimizer = torch.optim.Adam(network.parameters(), 0.1)
    for _ in range(3):
        network(images()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    network.save_pretrained(tmp_path / "saved")
    arguments = {
        "tests": str(Path(__file__).parent),
        "folder": str(tmp_path / "saved"),
        "output": str(tmp_path / "out"),
    }
    subprocess.run([sys.executable, "-c", RELOAD.format(**arguments)], check=True)
    output, state = torch.load(tmp_path / "out")
    assert torch.equal(output, network.eval()(images()))
    for name, weight in network.weights().items():
        assert torch.equal(state[name], weight)
    assert int(state["norm.num_batches_tracked"]) == 3


def test_a_vision_transformer_needs_no_class(tmp_path: Path) -> None:
    network = SeededNetwork(tiny_models.vit(), PrancConfig(num_coefficients=100))
    randomize(network)
    network.eval().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "seed_config.json",
    }
    assert (tmp_path / "model.safetensors").stat().st_size < 4 * 100 + 300 + 512
    pixels = torch.randn(2, 3, 16, 16)
    assert torch.equal(load_from_seed(tmp_path)(pixels).logits, network(pixels).logits)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PrancConfig(num_coefficients=SIZE + 1), f"`num_coefficients` must be at most the {SIZE} parameters"),
        (lambda: McncConfig(apply_to="weight", d=SIZE + 1), f"`d` must be at most the {SIZE} parameters"),
        (
            lambda: McncConfig(d=30),
            "apply_to='weight', to make a whole network, got McncConfig with apply_to='factors'",
        ),
        (lambda: NolaConfig(), "`config` must be a PrancConfig, or a McncConfig .* got NolaConfig"),
    ],
)
def test_configurations_that_make_no_network_are_refused(make: Callable[[], Config], message: str) -> None:
    network = Small()
    with pytest.raises(ValueError, match=message):
        SeededNetwork(network, make())
    assert sum(parameter.numel() for parameter in network.parameters()) == SIZE  # left as it was


def damage(folder: Path, what: str) -> None:
    config = json.loads((folder / "seed_config.json").read_text())
    state = load_file(folder / "model.safetensors")
    if what == "seed":
        config["method"]["seed"] = 4
    elif what == "version":
        config["method"]["generator_version"] = 9
    elif what == "length":
        state["coefficients.network"] = torch.zeros(19)
    elif what == "values":
        state["coefficients.network"][0] = torch.nan
    (folder / "seed_config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("seed", "`fingerprint` must be"),
        ("version", "`generator_version` must be 1"),
        ("length", r"must hold .*coefficients.network \(20,\)"),
        ("values", "must be finite, got NaN or infinity in model.safetensors"),
    ],
)
def test_damaged_checkpoints_are_refused(what: str, message: str, tmp_path: Path) -> None:
    SeededNetwork(Small(), CONFIGS["PRANC"]()).save_pretrained(tmp_path)
    damage(tmp_path, what)
    with pytest.raises(ValueError, match=message):
        load_from_seed(tmp_path, Small())


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    SeededNetwork(Small(), CONFIGS["PRANC"]()).save_pretrained(tmp_path)
    other = Small()
    other.first = nn.Linear(4, 5)
    with pytest.raises(
        ValueError, match=r"must be the Small that was saved: 3 parameters differ, the first is 'first.b"
    ):
        load_from_seed(tmp_path, other)
    with pytest.raises(ValueError, match="`network` must be given: 'Small' is no class of transformers"):
        load_from_seed(tmp_path)
