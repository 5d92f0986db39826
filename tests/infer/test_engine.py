"""The engine against `generate`, one request at a time: the same tokens, whatever else is in the batch."""

import random

import pytest
import torch

from retentive.infer import SamplingParams, generate
from retentive.infer.cache import PrefixCache
from retentive.infer.engine import Engine, Full
from retentive.models import RetNetConfig, build, twin

CONFIG = RetNetConfig(vocab_size=61, dim=32, layers=2, heads=2)
MODELS = {"retnet": CONFIG, "transformer": twin(CONFIG)}


@pytest.fixture(params=MODELS)
def model(request):
    out = build(MODELS[request.param]).eval()
    for p in out.parameters():  # peaked enough that greedy choices are no ties
        torch.nn.init.normal_(p, std=2 * p.shape[-1] ** -0.5) if p.ndim == 2 else None
    return out


def requests(count: int) -> list[tuple[list[int], SamplingParams, int]]:
    """Prompts of 1 to 90 tokens, every third with a beginning in common; greedy and sampled in many ways."""
    rng = random.Random(0)
    common = [rng.randrange(61) for _ in range(40)]
    made = []
    for n in range(count):
        ids = [rng.randrange(61) for _ in range(rng.choice([1, 2, 9, 30, 50]))]
        params = SamplingParams(
            temperature=rng.choice([0, 0.7, 1.3]), top_k=rng.choice([0, 8]), top_p=rng.choice([1, 0.9]), seed=n
        )
        made.append(((common[: rng.choice([17, 40])] if n % 3 == 0 else []) + ids, params, rng.randint(1, 25)))
    return made


def one_by_one(model, todo) -> list[list[int]]:
    return [[t.id for t in generate(model, ids, params, max_tokens=n)] for ids, params, n in todo]


@pytest.mark.parametrize("cached", [False, True], ids=["no-cache", "cache"])
def test_requests_that_join_and_leave_at_random_get_their_own_tokens(model, cached):
    todo, rng = requests(60), random.Random(1)
    cache = PrefixCache(1 << 20, stretch=16) if cached else None
    engine, streams = Engine(model, slots=5, piece=24, waiting=100, cache=cache), []
    for ids, params, n in todo:
        streams += engine.submit(ids, params, max_tokens=n)
        for _ in range(rng.randrange(4)):
            engine.step()
    while engine.step():
        pass
    assert [[t.id for t in s] for s in streams] == one_by_one(model, todo)
    assert {s.reason for s in streams} == {"length"}
    assert engine.taken == 0
    if cache is not None:
        assert cache.hits > 5 and cache.nbytes <= 1 << 20
        assert sum(s.cached for s in streams) == engine.counts["cached_tokens"] > 0


def test_a_thread_of_its_own_gives_the_same(model):
    todo = requests(12)
    engine = Engine(model, slots=4).start()
    streams = [engine.submit(ids, params, max_tokens=n)[0] for ids, params, n in todo]
    assert [[t.id for t in s] for s in streams] == one_by_one(model, todo)
    engine.close()
    with pytest.raises(Full, match="closing"):
        engine.submit([1])


def test_n_streams_read_the_prompt_once_and_have_seeds_in_a_row(model):
    engine = Engine(model, slots=4)
    streams = engine.submit([5, 6, 7], SamplingParams(seed=3), max_tokens=9, n=3)
    while engine.step():
        pass
    want = one_by_one(model, [([5, 6, 7], SamplingParams(seed=3 + i), 9) for i in range(3)])
    assert [[t.id for t in s] for s in streams] == want
    assert engine.counts["prompt_tokens"] == 3


def test_a_cancelled_request_frees_its_slot_at_the_next_step(model):
    engine = Engine(model, slots=1)
    (first,), (second,) = engine.submit([1, 2]), engine.submit([3], SamplingParams(temperature=0), max_tokens=4)
    for _ in range(5):
        engine.step()
    first.cancel()
    while engine.step():
        pass
    assert first.reason == "cancelled" and len(list(first)) >= 4
    assert [[t.id for t in second]] == one_by_one(model, [([3], SamplingParams(temperature=0), 4)])


def test_a_kept_state_goes_on_where_the_stream_ended(model):
    engine, greedy = Engine(model, slots=2), SamplingParams(temperature=0)
    (first,) = engine.submit([4, 5, 6], greedy, max_tokens=6, keep_state=True)
    while engine.step():
        pass
    (second,) = engine.submit(first.pending, greedy, max_tokens=6, state=first.state)
    while engine.step():
        pass
    whole = one_by_one(model, [([4, 5, 6], greedy, 12)])[0]
    assert [t.id for t in first] + [t.id for t in second] == whole


def test_the_prompts_own_log_probabilities(model):
    ids, engine = [3, 1, 4, 1, 5, 9, 2, 6], Engine(model, slots=1, piece=3)
    (stream,) = engine.submit(ids, max_tokens=1, score=True, top=2)
    while engine.step():
        pass
    with torch.no_grad():
        want = model(torch.tensor([ids]))[0][0, :-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    # float32, two layers summed in other orders
    torch.testing.assert_close(torch.tensor(stream.prompt_logprobs), want, rtol=1e-4, atol=1e-4)
    assert len(next(iter(stream)).top) == 2


def test_a_full_queue_and_bad_requests_are_refused(model, refuses):
    engine = Engine(model, slots=2, waiting=1)
    engine.submit([1])
    with pytest.raises(Full, match="1 requests are waiting already"):
        engine.submit([1])
    for arguments, words in (
        (dict(ids=[]), "at least one token"),
        (dict(ids=[61]), "token ids must be in [0, 61)"),
        (dict(ids=[1], n=3), "n must be from 1 to the engine's 2 slots, got 3"),
        (dict(ids=[1], max_tokens=0), "max_tokens must be at least 1, got 0"),
    ):
        with refuses(words):
            engine.submit(**arguments)
