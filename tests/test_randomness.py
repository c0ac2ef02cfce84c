"""The random number specification: known answers, and independence of everything that must not matter."""

from __future__ import annotations

import hashlib
import json
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_ext import randomness

STREAM = ("known", "answer")
# (w >> 8) of the 32-bit words; the number is this times 2**-23, minus 1.
KNOWN = {
    (0, STREAM, 0): [10756596, 5981894, 14329571, 14642512, 5136085, 13399133, 15115371, 1946926],
    (2**64 - 1, STREAM, 0): [12572142, 8422728, 4470180, 3475924],
    (0, STREAM, 1_000_003): [9928167, 12674932, 1935234],
    (0, ("nola", "A", 8, 576, "basis"), 0): [5767938, 2217563, 3538719, 6743843],
}


@pytest.mark.parametrize(("place", "integers"), KNOWN.items())
def test_known_answers(place, integers):
    seed, stream, start = place
    expected = torch.tensor([integer / 2**23 - 1 for integer in integers], dtype=torch.float64)
    numbers = randomness.uniform(seed, stream, len(integers), start)
    assert numbers.dtype == torch.float32
    assert torch.equal(numbers.double(), expected)


@pytest.mark.parametrize(("seed", "digits"), [(0, "5aa95d294f358835"), (12345, "c2725de3cabfbc5e")])
def test_known_fingerprints(seed, digits):
    assert randomness.fingerprint(seed) == digits


def test_matches_the_written_specification():
    """The steps of the module's docstring, followed word by word."""
    seed, stream, count = 7, ("a", 3, "b"), 50
    name = json.dumps(["peft_ext", 1, "a", 3, "b"], separators=(",", ":")).encode()
    key = np.array([seed, int.from_bytes(hashlib.sha256(name).digest()[:8], "little")], dtype=np.uint64)
    raw = np.random.Philox(key=key).random_raw(count // 2)
    words = [half for word in raw.tolist() for half in (word & 0xFFFFFFFF, word >> 32)]
    expected = [(word >> 8) * 2.0**-23 - 1 for word in words]
    assert randomness.uniform(seed, stream, count).tolist() == expected


@settings(max_examples=60, deadline=None)
@given(start=st.integers(0, 5000), count=st.integers(0, 300))
def test_any_chunk_is_a_part_of_the_stream(start, count):
    whole = randomness.uniform(3, STREAM, 5300)
    assert torch.equal(randomness.uniform(3, STREAM, count, start), whole[start : start + count])


def test_chunks_across_the_internal_buffer():
    whole = randomness.uniform(3, STREAM, 2 * randomness._CHUNK + 100)
    for start in (randomness._CHUNK - 3, 2 * randomness._CHUNK - 1):
        assert torch.equal(randomness.uniform(3, STREAM, 50, start), whole[start : start + 50])


def test_large_positions():
    start = 2**33 + 5  # beyond what 32-bit counters reach
    whole = randomness.uniform(3, STREAM, 40, start - 8)
    assert torch.equal(randomness.uniform(3, STREAM, 32, start), whole[8:])


def test_independent_of_torch_state():
    expected = randomness.uniform(1, STREAM, 100).tolist()
    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.inference_mode():
            numbers = randomness.uniform(1, STREAM, 100)
    finally:
        torch.set_default_dtype(torch.float32)
    assert numbers.device.type == "cpu" and numbers.dtype == torch.float32
    assert not numbers.is_inference()
    assert numbers.tolist() == expected


def test_independent_of_threads():
    expected = randomness.uniform(1, STREAM, 3000)
    results: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(randomness.uniform(1, STREAM, 3000))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    results.append(randomness.uniform(1, STREAM, 3000))
    torch.set_num_threads(number)
    assert len(results) == 5 and all(torch.equal(result, expected) for result in results)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_same_bits_on_a_gpu():
    numbers = randomness.uniform(1, STREAM, 1000)
    with torch.device("cuda"):
        assert torch.equal(randomness.uniform(1, STREAM, 1000), numbers)
    assert torch.equal(numbers.cuda().cpu(), numbers)


def test_uniform_on_the_interval():
    numbers = randomness.uniform(0, STREAM, 1_000_000).double()
    assert -1 <= numbers.min() < -0.999 and 0.999 < numbers.max() < 1
    # Five standard errors: 0.577 / 1000 for the mean, 0.298 / 1000 for the mean of squares.
    assert abs(numbers.mean()) < 0.0029 and abs(numbers.square().mean() - 1 / 3) < 0.0015
    assert abs((numbers[1:] * numbers[:-1]).mean()) < 0.0017


@pytest.mark.parametrize(
    "other", [(1, STREAM), (0, ("known", "answers")), (0, ("known", "answer", 0)), (0, ("knowna", "nswer"))]
)
def test_seeds_and_streams_are_independent(other):
    a, b = randomness.uniform(0, STREAM, 10_000), randomness.uniform(*other, 10_000)
    assert abs((a * b).mean()) < 0.0167  # five standard errors


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "1", None, True])
def test_a_bad_seed_is_refused(seed):
    with pytest.raises(ValueError, match=r"`seed` must be an integer between 0 and 2\*\*64 - 1, got"):
        randomness.uniform(seed, STREAM, 1)


def test_an_unknown_version_is_refused():
    with pytest.raises(ValueError, match="`generator_version` must be 1 .* got 2.*upgrade peft_ext"):
        randomness.uniform(0, STREAM, 1, version=2)
