"""SeededNetwork: whole networks from a seed and coefficients."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, default_data_collator
from transformers.pytorch_utils import Conv1D

from peft_ext import McncConfig, NolaConfig, PrancConfig, SeededNetwork, VisualPromptConfig, load_from_seed
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
    "MCNC, factors": lambda: McncConfig(r=4, k=2, d=20, widths=(8,), seed=3),
    "NOLA": lambda: NolaConfig(r=3, num_basis=(5, 7), seed=3),
    "NOLA, own bases": lambda: NolaConfig(r=3, num_basis=6, share_basis=False, parametrization="plain", seed=3),
}
FACTORS = ["MCNC, factors", "NOLA", "NOLA, own bases"]
Config = PrancConfig | McncConfig | NolaConfig


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


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - set(FACTORS)))
def test_updates_are_those_of_one_generator_over_all_weights(name: str) -> None:
    network = SeededNetwork(Small(), CONFIGS[name]())
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


class Several(nn.Module):
    """Matrices that are stored as (outputs, inputs), transposed and by tokens, wide and tall ones, and vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 6)
        self.places = nn.Parameter(torch.randn(1, 5, 6))
        self.narrow = nn.Linear(6, 3)
        self.turned = Conv1D(7, 3)
        self.conv = nn.Conv1d(1, 4, 2)
        self.norm = nn.LayerNorm(24)
        self.score = nn.Linear(24, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.turned(torch.tanh(self.narrow(self.tokens(x) + self.places))))
        return self.score(self.norm(self.conv(x.mean(1, keepdim=True)).flatten(1)))


# name: shape of the matrix, whether the parameter is its transpose, spread
MATRICES = {
    "places": ((5, 6), False, 0.02),
    "tokens.weight": ((9, 6), False, 0.02),
    "narrow.weight": ((3, 6), False, 1 / math.sqrt(6)),
    "turned.weight": ((7, 3), True, 1 / math.sqrt(3)),
    "conv.weight": ((4, 2), False, 1 / math.sqrt(2)),
}
R = 4
SEVERAL = {
    "MCNC": lambda **options: McncConfig(r=R, k=3, d=25, widths=(6,), seed=5, **options),
    "NOLA": lambda **options: NolaConfig(r=R, num_basis=(6, 5), seed=5, **options),
}


def dense_manifold(config: McncConfig, chunks: torch.Tensor, size: int, kind: str) -> torch.Tensor:
    """What `chunks` of coefficients come to, by the formulas of the paper and of docs/mcnc.md."""
    scaled = config.parametrization == "scaled"
    sizes = (config.k, *config.widths, config.chunk_size)
    stream = ("mcnc", "phi", *sizes, "layer")
    layers = [
        uniform(5, (*stream, i), a * b).view(a, b).double() * math.sqrt((2 if i else 1) * 3 / a)
        for i, (a, b) in enumerate(zip(sizes, sizes[1:]))
    ]
    out = torch.sin((50 if scaled else config.frequency) * chunks[:, :-1] @ layers[0]) @ layers[1]
    out = out / out.square().mean(1, keepdim=True).sqrt()
    numbers = min(config.chunk_size, size)
    shared = numbers / (config.k + 1)
    factor = {"A": shared**0.25, "B": shared**0.5, "vectors": numbers**0.5}[kind] if scaled else 1.0
    start = uniform(5, ("network", "mcnc", "A", "offset"), size).double() * math.sqrt(3) if kind == "A" else 0.0
    return (factor * chunks[:, -1:] * out).flatten()[:size] + start


def dense_updates(config: Config, coefficients: torch.Tensor, vectors: int) -> tuple[dict[str, torch.Tensor], Any]:
    """The updates of matrices by name, and those of all vectors, as plain operations on tensors."""
    scaled = config.parametrization == "scaled"
    ranks = {name: min(R, *shape) for name, (shape, _, _) in MATRICES.items()}
    shapes_A = [(ranks[name], MATRICES[name][0][1]) for name in MATRICES]
    shapes_B = [(MATRICES[name][0][0], ranks[name]) for name in MATRICES]
    if isinstance(config, McncConfig):
        sizes = [sum(map(math.prod, shapes)) for shapes in (shapes_A, shapes_B)] + [vectors]
        own = coefficients.view(-1, config.k + 1).split([-(-size // config.chunk_size) for size in sizes])
        kinds = ("A", "B", "vectors")
        all_A, all_B, rest = (dense_manifold(config, *each) for each in zip(own, sizes, kinds))
        found_A, found_B = all_A.split([*map(math.prod, shapes_A)]), all_B.split([*map(math.prod, shapes_B)])
    else:
        num_A, num_B = config.num_basis_per_factor

        def combined(stream: tuple[Any, ...], own: torch.Tensor, size: int, factor: float) -> torch.Tensor:
            basis = uniform(5, (*stream, "basis"), len(own) * size).view(-1, size).double()
            return (factor if scaled else 1.0) / math.sqrt(len(own)) * own @ basis

        parts = coefficients.split([num_A] * 5 + [num_B] * 6)
        found_A, found_B = [], []
        for i, (shape_A, shape_B) in enumerate(zip(shapes_A, shapes_B)):
            streams = ("network", "nola", "A", *shape_A), ("network", "nola", "B", *shape_B)
            start = uniform(5, (*streams[0], "offset"), math.prod(shape_A)).double() * math.sqrt(3)
            factor_A = math.sqrt(3) * (math.prod(shape_A) / num_A) ** 0.25
            found_A.append(start + combined(streams[0], parts[i], math.prod(shape_A), factor_A))
            size = math.prod(shape_B)
            found_B.append(combined(streams[1], parts[5 + i], size, math.sqrt(3 * size / num_B)))
        rest = combined(("network", "nola", "vectors"), parts[-1], vectors, math.sqrt(3 * vectors / num_B))
    matrices = {}
    for name, A, B, shape_A, shape_B in zip(MATRICES, found_A, found_B, shapes_A, shapes_B):
        scale = math.sqrt(shape_A[1]) / ranks[name] if scaled else 1 / math.sqrt(ranks[name])
        matrices[name] = scale * B.view(shape_B) @ A.view(shape_A)
    return matrices, rest


@pytest.mark.parametrize("parametrization", ["scaled", "plain"])
@pytest.mark.parametrize("method", SEVERAL)
def test_factors_and_their_gradients_against_dense_products(method: str, parametrization: str) -> None:
    config = SEVERAL[method](parametrization=parametrization)
    network = SeededNetwork(Several(), config).double()
    start = network.weights()
    randomize(network)
    (coefficients,) = network.parameters()
    leaf = coefficients.detach().clone().requires_grad_()
    vectors = {name: weight for name, weight in start.items() if name not in MATRICES}
    matrices, rest = dense_updates(config, leaf, sum(weight.numel() for weight in vectors.values()))
    initial = {name: weight.detach() for name, weight in SeededNetwork(Several(), SEVERAL[method]()).weights().items()}
    expected = {}
    for name, matrix in matrices.items():
        _, transposed, spread = MATRICES[name]
        update = (matrix.T if transposed else matrix).reshape(initial[name].shape)
        expected[name] = initial[name] + spread * update
    for (name, weight), part in zip(vectors.items(), rest.split([weight.numel() for weight in vectors.values()])):
        spread = 1 / math.sqrt(24) if name == "score.weight" else 0.1
        expected[name] = initial[name] + spread * part.view(weight.shape)
    assert expected.keys() == initial.keys()  # every parameter is accounted for
    for name, weight in network.weights().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-5)
    x = torch.arange(10).view(2, 5) % 9
    torch.func.functional_call(Several().double(), expected, x).square().sum().backward()
    network(x).square().sum().backward()
    assert coefficients.grad is not None and leaf.grad is not None and leaf.grad.ne(0).double().mean() > 0.9
    torch.testing.assert_close(coefficients.grad, leaf.grad, rtol=1e-3, atol=1e-4 * leaf.grad.abs().max().item())


LARGE = {
    "PRANC": lambda: PrancConfig(num_coefficients=400, seed=5),
    "MCNC, weights": lambda: McncConfig(apply_to="weight", k=4, d=50, seed=5),
    "MCNC, rank 2": lambda: McncConfig(r=2, k=4, d=50, seed=5),
    "MCNC, rank 64": lambda: McncConfig(r=64, k=4, d=50, seed=5),
    "NOLA, rank 4": lambda: NolaConfig(r=4, num_basis=50, seed=5),
    "NOLA, rank 64": lambda: NolaConfig(r=64, num_basis=(5, 90), seed=5),
}


def large() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 100), nn.LayerNorm(100), nn.Linear(100, 80), nn.Embedding(60, 70))


@pytest.mark.parametrize("name", LARGE)
def test_a_first_step_changes_the_loss_as_one_of_all_weights_would(name: str) -> None:
    """To first order, and in units of theta0's spread; see docs/learning-rates.md."""
    network = SeededNetwork(large(), LARGE[name]())
    (coefficients,) = network.parameters()
    weights = network.weights()
    generator, here, direct = torch.Generator().manual_seed(0), 0.0, 0.0
    for _ in range(20):
        gradients = [torch.randn(weight.shape, generator=generator) for weight in weights.values()]
        moved = [w * g / each.spread for w, g, each in zip(weights.values(), gradients, network._weights)]
        (found,) = torch.autograd.grad(sum(map(torch.sum, moved)), coefficients, retain_graph=True)
        here += found.abs().sum().item()
        direct += sum(gradient.abs().sum().item() for gradient in gradients)
    # The inputs of MCNC's chunks wait for their amplitudes: a step of B is smaller by sqrt(k + 1).
    waiting = math.sqrt(5) if name.startswith("MCNC, rank") else 1.0
    assert waiting * here / direct == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("name", [name for name in LARGE if "rank" in name])
def test_factors_start_at_an_update_of_zero_and_a_random_A_of_their_own(name: str) -> None:
    config = LARGE[name]()
    network = SeededNetwork(large(), config)
    start = SeededNetwork(large(), LARGE["PRANC"]()).weights()
    assert all(torch.equal(weight, start[key]) for key, weight in network.weights().items())
    other = SeededNetwork(large(), dataclasses.replace(config, seed=6))
    values = [
        each.generators[0].expand(each.coefficients["network"][: each.generators[0].num_coefficients])
        for each in (network, other)
    ]
    assert all(value.square().mean().item() == pytest.approx(1, abs=0.1) for value in values)
    assert not torch.allclose(*values)


@pytest.mark.parametrize("name", [name for name in LARGE if "rank" in name])
def test_an_update_is_as_large_as_the_start(name: str) -> None:
    network = SeededNetwork(large(), dataclasses.replace(LARGE[name](), parametrization="plain"))
    start = network.weights()
    with torch.no_grad():
        network.coefficients["network"].sign_().masked_fill_(network.coefficients["network"] == 0, 1.0)
    for weight in network._weights:
        change = (network.weights()[weight.name] - start[weight.name]) / weight.spread
        assert 0.5 < change.square().mean().sqrt().item() < 1.6, weight.name


@pytest.mark.parametrize("name", FACTORS)
def test_autocast_does_not_round_products(name: str) -> None:
    network = SeededNetwork(Small(), CONFIGS[name]())
    randomize(network)
    expected = network.weights()
    with torch.autocast("cpu", torch.bfloat16):
        found = network.weights()
    assert all(torch.equal(weight, found[key]) for key, weight in expected.items())


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


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_a_plain_recurrent_network(kind: type[nn.RNNBase]) -> None:
    """Such modules keep a list of their weights beside their parameters."""
    network = SeededNetwork(kind(4, 4), PrancConfig(num_coefficients=20, seed=3))
    randomize(network)
    x = torch.randn(3, 2, 4)
    expected = network(x)[0]
    for plain in (network.to_plain(), network.unwrap()):
        torch.testing.assert_close(plain(x)[0], expected)
        assert len(list(plain.parameters())) == 4


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
for folder in {folders!r}:
    network = load_from_seed(folder, Small())
    torch.save((network(images()), network.state_dict()), folder + "/out")
"""


def test_equal_to_the_bit_in_a_new_process(tmp_path: Path) -> None:
    networks = {str(tmp_path / str(i)): SeededNetwork(Small(), make()) for i, make in enumerate(CONFIGS.values())}
    for folder, network in networks.items():
        optimizer = torch.optim.Adam(network.parameters(), 0.1)
        for _ in range(3):
            network(images()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        network.save_pretrained(folder)
    code = RELOAD.format(tests=str(Path(__file__).parent), folders=list(networks))
    subprocess.run([sys.executable, "-c", code], check=True)
    for folder, network in networks.items():
        output, state = torch.load(Path(folder, "out"))
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
        (lambda: McncConfig(r=3, d=67), "`d` must be at most the 66 numbers of the factors A or B or of the vectors"),
        (lambda: McncConfig(r=5, d=30), "`r` must be at most 4, the highest rank .* got 5"),
        (lambda: NolaConfig(r=5), "`r` must be at most 4, the highest rank .* got 5"),
        (
            lambda: McncConfig(r=3, d=30, alpha=3.0),
            "`alpha` must be 8.0, its default, to make .* got 3",
        ),
        (lambda: NolaConfig(r=3, num_basis=9, alpha=3.0), "`alpha` must be 8.0, its default"),
        (lambda: NolaConfig(r=3, num_basis=9, rank_pattern={"a": 2}), "`rank_pattern` must be {}, its default"),
        (lambda: NolaConfig(r=3, num_basis=9, alpha_pattern={"a": 2.0}), "`alpha_pattern` must be {}, its default"),
        (lambda: NolaConfig(r=3, num_basis=22), f"`num_basis` must give at most .* {SIZE}, got 110 for the 2 matrices"),
        (lambda: VisualPromptConfig(), "`config` must be a NolaConfig, a PrancConfig or a McncConfig, got VisualP"),
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
    network = Small()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match=message):
        load_from_seed(tmp_path, network)
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


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


def test_the_network_that_is_given_is_the_one_that_is_made(tmp_path: Path) -> None:
    seeded, given = SeededNetwork(Small(), CONFIGS["PRANC"]()).eval(), Small()
    randomize(seeded)
    seeded.save_pretrained(tmp_path)
    assert load_from_seed(tmp_path, given) is given
    assert torch.equal(given(images()), seeded(images()))
    assert not any(parameter.requires_grad for parameter in given.parameters())


def test_tables_that_a_network_makes_anew_are_not_saved(tmp_path: Path) -> None:
    """Position numbers and rotary frequencies are buffers that no state dict has."""
    seeded, other = (SeededNetwork(tiny_models.llama(), PrancConfig(num_coefficients=20)) for _ in range(2))
    assert any(name.endswith("inv_freq") for name, _ in seeded.named_buffers())
    randomize(seeded)
    other.load_state_dict(seeded.state_dict())
    assert torch.equal(other.coefficients["network"], seeded.coefficients["network"])
    seeded.save_pretrained(tmp_path)
    tokens = tiny_models.tokens(2)
    loaded = load_from_seed(tmp_path, tiny_models.llama())
    torch.testing.assert_close(loaded(tokens).logits, seeded.eval()(tokens).logits)


def test_gradient_checkpointing_is_refused(tmp_path: Path) -> None:
    seeded = SeededNetwork(tiny_models.vit(), PrancConfig(num_coefficients=20))
    pixels = torch.randn(2, 3, 16, 16)
    rows = [{"pixel_values": image, "labels": 0} for image in pixels]
    options = tiny_models.arguments(tmp_path, max_steps=1, gradient_checkpointing=True, label_names=["labels"])
    with pytest.raises(ValueError, match="must be trained without gradient checkpointing"):
        Trainer(seeded, options, train_dataset=rows, data_collator=default_data_collator).train()  # type: ignore[arg-type]
    seeded.network.gradient_checkpointing_enable()  # type: ignore[operator]
    with pytest.raises(ValueError, match="`gradient_checkpointing_disable"):
        seeded.train()(pixel_values=pixels)
    assert seeded.eval()(pixel_values=pixels).logits.shape == (2, 3)


def test_a_dtype_that_is_none_is_refused_before_it_is_saved(tmp_path: Path) -> None:
    seeded = SeededNetwork(Small(), CONFIGS["PRANC"]())
    seeded.config.coefficient_dtype = "int16"
    with pytest.raises(ValueError, match="`coefficient_dtype` must be one of .*'int16'"):
        seeded.save_pretrained(tmp_path / "network")
    model = get_peft_model(tiny_models.vit(), PrancConfig(num_coefficients=20))
    for dtype in ("int16", "float64", "fp16"):
        model.peft_config["default"].coefficient_dtype = dtype  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match=f"`coefficient_dtype` must be one of .*'{dtype}'"):
            model.save_pretrained(str(tmp_path / dtype))
    model.peft_config["default"].coefficient_dtype = "int8"  # type: ignore[attr-defined]
    model.peft_config["default"].apply_to = "factors"  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="`apply_to` of the configuration was changed after the adapter was made"):
        model.save_pretrained(str(tmp_path / "changed"))
