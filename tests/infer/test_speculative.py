"""Speculative against plain decoding: equal greedy tokens, equal sampled distribution, and exact rollback of states."""

import functools
import random
from collections import Counter
from itertools import islice, product

import pytest
import torch

from retentive.infer import SamplingParams, generate
from retentive.infer.generate import Token
from retentive.infer.sample import Sampler
from retentive.infer.speculative import Lookup, judge, speculate
from retentive.models import build, retnet, twin
from tests.infer.kinds import kinds

CONFIG = retnet(vocab_size=61, dim=32, layers=2, heads=2)
SMALLER = retnet(vocab_size=61, dim=16, layers=1, heads=1)
MODELS = kinds(CONFIG)
GREEDY = SamplingParams(temperature=0)


def peaked(config):
    """A model without ties in greedy choices, in float64, so that they do not depend on the tokens per call."""
    out = build(config).double().eval()
    for p in out.parameters():
        torch.nn.init.normal_(p, std=2 * p.shape[-1] ** -0.5) if p.ndim == 2 else None
    return out


@pytest.fixture(params=MODELS)
def model(request):
    return peaked(MODELS[request.param])


def prompts() -> list[list[int]]:
    rng = random.Random(0)
    plain = [[rng.randrange(61) for _ in range(n)] for n in (1, 2, 30)]
    return [*plain, plain[2][:7] * 9, [5] * 20]


@functools.cache
def plain(kind: str) -> list[list[Token]]:
    """Tokens of plain decoding after each prompt, by the model of this kind."""
    torch.manual_seed(0)
    model = peaked(MODELS[kind])
    return [list(generate(model, ids, GREEDY, max_tokens=40)) for ids in prompts()]


@pytest.mark.slow
# few and many guesses by one kind of model, between them by all
@pytest.mark.parametrize("kind, most", [*((kind, 4) for kind in MODELS), ("retnet", 1), ("retnet", 9)])
@pytest.mark.parametrize("how", ["lookup", "smaller", "twin-drafts", "itself"])
def test_greedy_tokens_are_those_of_plain_generation(kind, how, most):
    wanted = plain(kind)
    torch.manual_seed(0)
    model = peaked(MODELS[kind])
    draft = {"lookup": None, "smaller": peaked(SMALLER), "twin-drafts": peaked(twin(SMALLER)), "itself": model}[how]
    counts = Counter()
    for ids, want in zip(prompts(), wanted, strict=True):
        got = list(speculate(model, ids, GREEDY, draft=draft, most=most, max_tokens=40, counts=counts))
        assert [t.id for t in got] == [t.id for t in want]
        logprobs = [[t.logprob for t in tokens] for tokens in (got, want)]
        torch.testing.assert_close(*logprobs, rtol=1e-5, atol=1e-5)  # float32 log-softmax
    assert counts["calls"] > 0
    if how == "itself":  # every guess is right, but for those after the last token
        assert counts["made"] - counts["right"] <= len(prompts()) * most < counts["made"]
        assert counts["calls"] <= len(prompts()) * (40 / (most + 1) + 1)
    if how == "smaller":
        assert counts["right"] < counts["made"], "the test wants wrong guesses as well"


def test_a_text_that_repeats_itself_takes_fewer_calls(model):
    """Greedy decoding of a small model ends in a loop, which look-up guesses; with random convolutions it does not."""
    for name, p in model.named_parameters():
        if name.endswith("convolution.weight"):
            torch.nn.init.zeros_(p)
    counts = Counter()
    list(speculate(model, [1, 2, 3], GREEDY, max_tokens=400, counts=counts))
    assert counts["right"] > 20 and counts["calls"] + counts["right"] >= 399


def test_stops_first_tokens_and_a_past(model):
    want = [t.id for t in generate(model, [4, 5], GREEDY, max_tokens=30, first_ids=[7, 8])]
    stop = next(t for t in want if t != want[0])
    got = speculate(model, [4, 5], GREEDY, stop_ids=[stop], first_ids=[7, 8], draft=model)
    assert [t.id for t in got] == want[: want.index(stop)]
    state = model.hidden(torch.tensor([[9, 4]]))[1]
    whole = [t.id for t in generate(model, [9, 4, 5], GREEDY, max_tokens=20)]
    assert [t.id for t in speculate(model, [5], GREEDY, state=state, max_tokens=20)] == whole


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["fp64", "fp32"])
@torch.no_grad()
def test_tokens_taken_back_leave_nothing_in_the_state(model, dtype, tol, same):
    """In float32 by the compiled step; rounding at 6e-8 grows over some fifty tokens and two layers."""
    model, ids = model.to(dtype), torch.randint(61, (2, 60))
    state = model.hidden(ids[:, :20])[1].for_decoding(dtype, rollback=6)
    at = 20
    for back in (6, 0, 3, 6, 5, 1):
        _, state = model.hidden(torch.cat((ids[:, at : at + 7 - back], torch.randint(61, (2, back))), 1), state)
        state.rollback(back)
        at += 7 - back
    after, state = model.hidden(ids[:, at : at + 1], state)
    want, whole = model.hidden(ids[:, : at + 1])
    same(after, want[:, -1:], tol)
    same(state.position, whole.position, 0)
    same(list(state.named().values()), list(whole.named().values()), tol)


@torch.no_grad()
def test_what_cannot_be_taken_back(model, refuses):
    state = model.hidden(torch.tensor([[1, 2, 3]]))[1]
    with refuses("cannot take back 4"):
        state.rollback(4)
    _, state = model.hidden(torch.tensor([[1]]), state.for_decoding(torch.float64, 1))
    with refuses("cannot take back 5"):
        state.rollback(5)
    state.rollback(1)
    assert state.position.tolist() == [3]


def surprise(counts: Counter, p: dict) -> float:
    """Distance of counts from probabilities: chi-square, in standard deviations above its mean."""
    total = sum(counts.values())
    kinds = [kind for kind in p if p[kind] * total >= 5]
    rest = total - sum(counts[k] for k in kinds), 1 - sum(p[k] for k in kinds)
    pairs = [(counts[k], p[k] * total) for k in kinds] + ([(rest[0], rest[1] * total)] if rest[1] * total > 1 else [])
    chi = sum((seen - want) ** 2 / want for seen, want in pairs)
    return (chi - (len(pairs) - 1)) / (2 * (len(pairs) - 1)) ** 0.5


@pytest.mark.parametrize("params", [dict(), dict(temperature=0.7, top_k=5), dict(top_p=0.8), dict(temperature=0)])
@pytest.mark.parametrize("certain", [True, False], ids=["certain", "drawn"])
def test_what_is_judged_is_distributed_as_if_there_were_no_guess(params, certain):
    logits = torch.randn(8)
    sampler = Sampler(SamplingParams(seed=0, **params), torch.tensor([0]), 8)
    q = None if certain else torch.randn(8).softmax(0)
    generator, counts = torch.Generator().manual_seed(1), Counter()
    for _ in range(3000):
        guess = 3 if certain else int(torch.multinomial(q, 1, generator=generator))
        counts[judge(sampler, logits, guess, q)] += 1
    p = sampler.distribution(logits)
    assert all(p[token] > 0 for token in counts)
    if params != dict(temperature=0):
        assert surprise(counts, dict(enumerate(p.tolist()))) < 4  # a right one exceeds it once in some thousand times


@pytest.mark.slow
@pytest.mark.parametrize("how", ["lookup", "draft"])
def test_sampled_sequences_are_as_likely_as_without_guessing(how):
    """All pairs of tokens after a first one, against their probabilities from the model itself."""
    torch.manual_seed(3)
    config = retnet(vocab_size=5, dim=16, layers=1, heads=1)
    model, draft = build(config).eval(), build(config).eval() if how == "draft" else None
    for p in (*model.parameters(), *(draft.parameters() if draft else ())):
        torch.nn.init.normal_(p, std=1.5 * p.shape[-1] ** -0.5) if p.ndim == 2 else None
    ids, made, wanted = [1, 2, 3, 4, 1, 2, 3, 4], Counter(), Counter()
    for seed in range(1200):
        tokens = speculate(model, ids, SamplingParams(seed=seed), draft=draft, most=2, first_ids=[1])
        made[tuple(t.id for t in islice(tokens, 3))] += 1
    for pair in product(range(5), repeat=2):
        with torch.no_grad():
            logits, _ = model(torch.tensor([[*ids, 1, *pair]]))
        chances = logits[0].softmax(-1)
        wanted[(1, *pair)] = float(chances[len(ids), pair[0]] * chances[len(ids) + 1, pair[1]])
    assert abs(sum(wanted.values()) - 1) < 1e-5
    assert surprise(made, wanted) < 4


def test_look_up_takes_the_longest_and_the_last_occurrence():
    guesser = Lookup()
    assert guesser.guess([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], 3) == ([9, 2, 3], [])
    assert guesser.guess([1, 2, 3, 9, 2, 3, 8, 1, 2, 3, 7, 7, 2, 3], 2) == ([7, 7], [])
    assert Lookup().guess([4, 5, 4, 5], 5) == ([4, 5, 4, 5, 4], [])
    assert Lookup().guess([1, 2, 3], 3) == ([], [])


def test_bad_arguments(model, refuses):
    with refuses("the draft model has 7 tokens, the model 61"):
        speculate(model, [1], draft=build(retnet(vocab_size=7, dim=16, layers=1, heads=1)))
    with refuses("most=0"):
        speculate(model, [1], most=0)
    with refuses("at least one token"):
        speculate(model, [])
