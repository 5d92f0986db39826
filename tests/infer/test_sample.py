"""Sampling against hand-made distributions: the tokens that each filter leaves, and their frequencies."""

import math

import pytest
import torch

from retentive.infer import SamplingParams, sample
from retentive.infer.sample import Sampler, filtered

# six tokens, not in order, and their probabilities
P = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.15, 0.05])
# float32 has 24 bits, 6e-8: a softmax of six numbers and a division cost some of them
CLOSE = 1e-6


def of(**kept: float) -> list[float]:
    """Probabilities of the tokens named t0 … t5, scaled to a sum of 1; the others have none."""
    return [kept.get(f"t{n}", 0.0) / sum(kept.values()) for n in range(6)]


FILTERS = {
    "none": (dict(), of(t0=0.1, t1=0.4, t2=0.05, t3=0.25, t4=0.15, t5=0.05)),
    "top-k-1": (dict(top_k=1), of(t1=1)),
    "top-k-3": (dict(top_k=3), of(t1=0.4, t3=0.25, t4=0.15)),
    "top-k-all": (dict(top_k=6), P.tolist()),
    "top-k-more": (dict(top_k=99), P.tolist()),
    # the token that crosses the sum is in, so the likeliest always is
    "top-p-least": (dict(top_p=1e-6), of(t1=1)),
    "top-p-0.39": (dict(top_p=0.39), of(t1=1)),
    "top-p-0.41": (dict(top_p=0.41), of(t1=0.4, t3=0.25)),
    "top-p-0.79": (dict(top_p=0.79), of(t1=0.4, t3=0.25, t4=0.15)),
    "top-p-0.81": (dict(top_p=0.81), of(t1=0.4, t3=0.25, t4=0.15, t0=0.1)),
    "top-p-1": (dict(top_p=1.0), P.tolist()),
    "min-p-0.3": (dict(min_p=0.3), of(t1=0.4, t3=0.25, t4=0.15)),
    "min-p-0.24": (dict(min_p=0.24), of(t1=0.4, t3=0.25, t4=0.15, t0=0.1)),
    "min-p-1": (dict(min_p=1.0), of(t1=1)),
    # at temperature 1/2 probabilities go as their squares, at 2 as their roots
    "temperature-0.5": (dict(temperature=0.5), of(**{f"t{n}": p**2 for n, p in enumerate(P.tolist())})),
    "temperature-2": (dict(temperature=2.0), of(**{f"t{n}": p**0.5 for n, p in enumerate(P.tolist())})),
    # one after the other, each on what the one before left: after top-k 3, t1 and t3 have 0.65 / 0.8 = 0.81
    "top-k-then-top-p": (dict(top_k=3, top_p=0.8), of(t1=0.4, t3=0.25)),
    # squares: t1 0.16, t3 0.0625 (0.39 of it), t4 0.0225 (0.14), of 0.26 in all (0.62, 0.24, 0.09)
    "temperature-then-min-p": (dict(temperature=0.5, min_p=0.3), of(t1=0.16, t3=0.0625)),
    "temperature-then-top-p": (dict(temperature=0.5, top_p=0.7), of(t1=0.16, t3=0.0625)),
}


@pytest.mark.parametrize("name", FILTERS)
def test_what_a_filter_leaves(name):
    options, want = FILTERS[name]
    p = filtered(P.log(), SamplingParams(**options))
    assert (p / p.sum()).tolist() == pytest.approx(want, rel=CLOSE)


@pytest.mark.parametrize("top_p", [0.2, 0.7, 0.95, 0.99, 1.0])
@pytest.mark.parametrize("top_k", [0, 7, 300, 900])
@pytest.mark.parametrize("width", [0.2, 3.0], ids=["flat", "peaked"])
def test_what_filters_leave_of_a_large_vocabulary(width, top_k, top_p):
    """Against sorting all tokens, in float64; with a few top tokens that suffice, and that do not."""
    logits = width * torch.randn(2000)
    p, order = logits.double().softmax(0).sort(descending=True)
    p = p[: top_k or None] / p[: top_k or None].sum()
    before = p.cumsum(0) - p
    count = int((before < top_p).sum())
    margin = (before - top_p).abs().min()
    assert margin > 1e-6 or top_p == 1, "no sum is so near that rounding decides"
    kept = filtered(logits, SamplingParams(top_k=top_k, top_p=top_p)) > 0
    assert kept.nonzero().flatten().tolist() == sorted(order[:count].tolist())


def test_of_equals_the_first_stay():
    logits = torch.tensor([0.0, 1, 1, 2, 1, 1, 0])
    assert (filtered(logits, SamplingParams(top_k=3)) > 0).tolist() == [False, True, True, True, False, False, False]
    assert (filtered(torch.zeros(1000), SamplingParams(top_p=0.4995)) > 0).nonzero().flatten().tolist() == [*range(500)]


@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_logits_need_no_normalising(shift):
    """Adding a constant changes no probability; 1000 in float32 leaves 6e-5 of each logit."""
    got, want = (filtered(x, SamplingParams(top_p=0.85)) for x in (P.log() + shift, P.log()))
    assert (got / got.sum()).tolist() == pytest.approx((want / want.sum()).tolist(), rel=1e-3)


def pick(logits, *, prompt=(), **options) -> tuple[int, float]:
    return Sampler(SamplingParams(**options), torch.tensor(prompt, dtype=torch.int64), len(logits))(logits)


def test_greedy_takes_the_likeliest_and_of_equals_the_first():
    assert pick(P.log(), temperature=0)[0] == 1
    assert pick(torch.tensor([1.0, 3.0, 3.0]), temperature=0)[0] == 1


def test_greedy_looks_at_no_filter_and_no_seed():
    for seed in range(5):
        assert pick(P.log(), temperature=0, top_k=5, top_p=0.9, seed=seed)[0] == 1


@pytest.mark.parametrize("options", [dict(temperature=0), dict(temperature=3.0, top_k=2), dict(min_p=0.3)], ids=str)
def test_the_logprob_is_the_models_own(options):
    """The log probability is that before temperature, filters and penalty."""
    for prompt in ((), (1,)):
        token, logprob = pick(P.log() + 5, prompt=prompt, **options, repetition_penalty=1.5)
        assert logprob == pytest.approx(math.log(P[token]), rel=CLOSE)


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = torch.tensor([2.0, 1.5, -1.0, -1.2])
    greedy = dict(temperature=0, repetition_penalty=2.0)
    assert pick(logits, **greedy)[0] == 0
    assert pick(logits, prompt=[0], **greedy)[0] == 1  # 2.0 / 2 < 1.5
    assert pick(logits, prompt=[0, 1, 1], **greedy)[0] == 0  # seen twice counts once: 1.0 > 0.75
    assert pick(logits[2:], prompt=[0], **greedy)[0] == 1  # -1.0 * 2 < -1.2
    assert pick(logits, prompt=[1], temperature=0, repetition_penalty=0.5)[0] == 1  # below 1 it rewards: 3.0 > 2.0


def test_tokens_that_end_the_text_get_no_repetition_penalty():
    params, logits = SamplingParams(temperature=0, repetition_penalty=2.0), torch.tensor([2.0, 1.5, 1.4])
    assert Sampler(params, torch.tensor([0, 1]), 3)(logits)[0] == 2
    assert Sampler(params, torch.tensor([0, 1]), 3, ends={0, 7})(logits)[0] == 0  # 7: outside the vocabulary
    assert Sampler(params, torch.tensor([0, 1]), 3, ends={2})(logits)[0] == 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_may_be_whole_numbers(temperature):
    bias = {n: -100 for n in range(6) if n != 3}
    assert pick(P.log(), temperature=temperature, bias=bias, seed=0)[0] == 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("options", [dict(repetition_penalty=1e-320), dict(bias={3: 1e39})], ids=["penalty", "bias"])
def test_what_float32_cannot_hold_is_a_great_deal(temperature, options):
    """The result is not NaN, from which no token can be picked."""
    logits = P.log().index_fill(0, torch.tensor([3]), 1.0).index_fill(0, torch.tensor([0]), 0.0)
    assert pick(logits, temperature=temperature, seed=0, prompt=[0, 3], **options)[0] == 3


def test_what_was_picked_is_penalised_from_then_on():
    logits = torch.tensor([3.0, 2.0, 1.0])
    sampler = Sampler(SamplingParams(temperature=0, repetition_penalty=4.0), torch.tensor([], dtype=torch.int64), 3)
    # 3, then 2 > 0.75, then 1 > 0.75 > 0.5, then all are seen: 0.75 is the largest
    assert [sampler(logits)[0] for _ in range(5)] == [0, 1, 2, 0, 0]
    assert logits.tolist() == [3.0, 2.0, 1.0], "the model's logits are left alone"


def draws(count: int, seed: int | None, **options) -> list[int]:
    sampler = Sampler(SamplingParams(seed=seed, **options), torch.tensor([0]), 6)
    return [sampler(P.log())[0] for _ in range(count)]


def test_a_seed_reproduces_and_no_seed_does_not():
    assert draws(50, 7) == draws(50, 7) != draws(50, 8)
    state = torch.get_rng_state()
    assert draws(50, None) != draws(50, None), "0.27^50 is the chance of their being the same"
    assert torch.equal(torch.get_rng_state(), state), "the global generator is not drawn from"


# sum (seen - expected)^2 / expected exceeds these in one of a thousand seeds; the seed is fixed
QUANTILES = {1: 10.83, 2: 13.82, 3: 16.27, 5: 20.52}


@pytest.mark.parametrize("name", ["none", "top-k-3", "top-p-0.81", "min-p-0.3", "temperature-2", "top-k-then-top-p"])
def test_tokens_come_as_often_as_they_should(name):
    options, want = FILTERS[name]
    count = 2000
    seen = torch.tensor(draws(count, 3, **options)).bincount(minlength=6)
    expected = count * torch.tensor(want)
    kept = expected > 0
    assert not seen[~kept].any()
    assert ((seen - expected)[kept] ** 2 / expected[kept]).sum() < QUANTILES[int(kept.sum()) - 1]


def test_norms_are_the_same_to_the_bit_in_a_batch_and_alone():
    """With two threads too, between which a single row of a large vocabulary would be divided."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        logits = 4 * torch.randn(5, 50257)
        samplers = [Sampler(SamplingParams(temperature=0), torch.tensor([0]), 50257) for _ in logits]
        together = sample.pick(logits, samplers)[1]
        alone = [sample.pick(row[None], samplers[:1])[1] for row in logits]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together, torch.cat(alone))
    assert torch.allclose(together.squeeze(1), logits.logsumexp(-1), rtol=CLOSE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_logits_of_any_dtype(dtype):
    assert pick(P.log().to(dtype), temperature=0)[0] == 1


BAD = {
    "temperature": (dict(temperature=-0.1), "`temperature=-0.1`: must be at least 0"),
    "temperature-nan": (dict(temperature=math.nan), "`temperature=nan`: must be at least 0"),
    "top-k": (dict(top_k=-1), "`top_k=-1`: must be at least 0"),
    "top-p-0": (dict(top_p=0.0), "`top_p=0.0`: must be in (0, 1]"),
    "top-p-2": (dict(top_p=2.0), "`top_p=2.0`: must be in (0, 1]"),
    "min-p": (dict(min_p=-0.1), "`min_p=-0.1`: must be in [0, 1]"),
    "min-p-2": (dict(min_p=1.1), "`min_p=1.1`: must be in [0, 1]"),
    "penalty": (dict(repetition_penalty=0.0), "`repetition_penalty=0.0`: must be above 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_parameters_that_cannot_be(case, refuses):
    options, message = BAD[case]
    with refuses(message):
        SamplingParams(**options)


def test_a_temperature_near_0_is_greedy():
    assert pick(10 * P.log(), temperature=1e-40, seed=0)[0] == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad, temperature, refuses):
    """argmax of NaN is a token, and a draw from NaN one beyond the vocabulary. (Single -inf are banned tokens.)"""
    logits = torch.full((6,), bad) if bad < 0 else P.log().index_fill(0, torch.tensor([2]), bad)
    sampler = Sampler(SamplingParams(temperature=temperature, seed=0), torch.tensor([0]), 6)
    with refuses("the model's logits are not finite", ArithmeticError):
        sampler(logits)
    assert sampler(P.log().index_fill(0, torch.tensor([1]), -torch.inf))[0] != 1


@pytest.mark.parametrize("temperature", [1e7, 1e30, 1e308])
def test_at_a_great_temperature_all_that_is_allowed_is_alike(temperature):
    logits = P.log().index_fill(0, torch.tensor([1]), -torch.inf)
    weights = filtered(logits, SamplingParams(temperature=temperature))
    assert (weights / weights.sum()).tolist() == pytest.approx([0.2, 0, 0.2, 0.2, 0.2, 0.2], abs=CLOSE)


@pytest.mark.parametrize("seed", [2**63, 2**70, -(2**63) - 1])
def test_a_seed_beyond_64_bits_is_refused(seed, refuses):
    with refuses(f"`seed={seed}`: must be from -2^63 to 2^63 - 1"):
        SamplingParams(seed=seed)
