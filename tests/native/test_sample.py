"""The sampler in C picks the same token as Python's with the same uniform number."""

import ctypes

import pytest
import torch

from retentive.export.native import SOURCE
from retentive.infer.sample import draw, filtered
from retentive.ops.compiler import NotBuilt, load
from retentive.sampling import SamplingParams

VOCAB, DRAWS = 1000, 200
MASK = 2**64 - 1


class Sampling(ctypes.Structure):
    """RetentiveSampling of retentive.h."""

    _fields_ = [
        ("temperature", ctypes.c_double),
        ("top_k", ctypes.c_int64),
        ("top_p", ctypes.c_double),
        ("min_p", ctypes.c_double),
    ]


@pytest.fixture(scope="module")
def sample():
    """`sample(logits, params, random)`: the token that C draws; `random` is a c_uint64."""
    built = load(SOURCE)
    if isinstance(built, NotBuilt):
        pytest.skip("needs a C compiler")
    built.retentive_sample.restype = ctypes.c_int64

    def sample(logits, params, random):
        how = Sampling(params.temperature, params.top_k, params.top_p, params.min_p)
        at, count = ctypes.c_void_p(logits.data_ptr()), ctypes.c_int64(len(logits))
        return built.retentive_sample(at, count, ctypes.byref(how), ctypes.byref(random))

    return sample


def uniform(state: int) -> float:
    """Uniform number of SplitMix64 from its state, as in the paper."""
    x = (state + 0x9E3779B97F4A7C15) & MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return ((x ^ x >> 31) >> 11) / 2**53


CASES = {
    "plain": {},
    "sharp": {"temperature": 0.3},
    "flat": {"temperature": 1e9},
    "top-k": {"top_k": 7},
    "one": {"top_k": 1},
    "more-than-there-are": {"top_k": 5000, "temperature": 2.0},
    "top-p": {"top_p": 0.9, "temperature": 0.8},
    "flat-top-p": {"top_p": 0.95, "temperature": 30.0},
    "little-p": {"top_p": 1e-9},
    "min-p": {"min_p": 0.05},
    "only-the-likeliest": {"min_p": 1.0},
    "all": {"temperature": 1.3, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
}


@pytest.mark.parametrize("kind", ["spread", "ties", "banned"])
@pytest.mark.parametrize("case", CASES)
def test_each_draw_is_pythons(case, kind, sample):
    params = SamplingParams(**CASES[case])
    torch.manual_seed(0)
    logits = torch.randn(VOCAB) * 3
    if kind == "ties":  # of equally likely tokens at the border the first are kept
        logits = (logits / 2).round()
    elif kind == "banned":
        logits[::2] = -torch.inf
    weights, random, found = filtered(logits, params), ctypes.c_uint64(5), set()
    for _ in range(DRAWS):
        u = torch.tensor([uniform(random.value)], dtype=torch.float64)
        want = int(draw(weights[None], u))
        assert sample(logits, params, random) == want
        found.add(want)
    assert len(found) > 1 or case in ("one", "little-p", "only-the-likeliest")


def test_temperature_0_picks_the_likeliest_and_draws_nothing(sample):
    logits, random = torch.tensor([1.0, 3.0, 3.0, 2.0]), ctypes.c_uint64(9)
    assert sample(logits, SamplingParams(temperature=0), random) == 1 and random.value == 9


@pytest.mark.parametrize("seed", [0, 1, MASK])
def test_any_seed_is_good(seed, sample):
    """Half of 4,000 tosses of a fair coin are heads, within five standard deviations."""
    random = ctypes.c_uint64(seed)
    heads = sum(sample(torch.zeros(2), SamplingParams(), random) for _ in range(4000))
    assert abs(heads - 2000) < 5 * (4000 / 4) ** 0.5


def test_logits_that_are_not_finite_are_refused(sample):
    for bad in ([1.0, float("nan")], [float("nan"), 1.0], [float("inf"), 1.0], [float("-inf")] * 2):
        for params in (SamplingParams(), SamplingParams(temperature=0)):
            assert sample(torch.tensor(bad), params, ctypes.c_uint64(0)) == -1
