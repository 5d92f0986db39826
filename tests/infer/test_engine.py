"""The engine against `generate`, one request at a time: the same tokens in any batch."""

import random
import threading

import pytest
import torch

from retentive.infer import SamplingParams, generate
from retentive.infer.cache import PrefixCache
from retentive.infer.engine import Engine, Full
from retentive.infer.requests import Returns
from retentive.models import ModelConfig, build, retnet, twin
from tests.configs import hybrid
from tests.infer.kinds import kinds

CONFIG = retnet(vocab_size=61, dim=32, layers=2, heads=2)
MODELS = kinds(CONFIG)
HYBRID = MODELS["hybrid"]
SHAPE = dict(vocab_size=61, dim=32, heads=2)
MODELS["hybrid-four-window"] = hybrid(**SHAPE, layers=4, attention_every=4, attention_window=5, attention_forget=True)


@pytest.fixture(params=MODELS)
def model(request):
    out = build(MODELS[request.param]).eval()
    for p in out.parameters():  # peaked enough that greedy choices are no ties
        torch.nn.init.normal_(p, std=2 * p.shape[-1] ** -0.5) if p.ndim == 2 else None
    return out


def requests(count: int) -> list[tuple[list[int], SamplingParams, int]]:
    """Requests with prompts of 1 to 90 tokens, every third with a common prefix; greedy and sampled in many ways."""
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


@pytest.mark.parametrize("count", [18, pytest.param(36, marks=pytest.mark.slow)])
def test_requests_that_join_and_leave_at_random_get_their_own_tokens(count, model):
    todo = requests(count)
    want = one_by_one(model, todo)
    for cache in (None, PrefixCache(1 << 20, every=16)):
        rng = random.Random(1)
        engine, streams = Engine(model, slots=5, prefill_chunk=24, waiting=100, cache=cache), []
        for ids, params, n in todo:
            streams += engine.submit(ids, params, max_tokens=n)
            for _ in range(rng.randrange(4)):
                engine.step()
        while engine.step():
            pass
        assert [[t.id for t in s] for s in streams] == want
        assert {s.reason for s in streams} == {"length"}
        assert engine.taken == 0
        if cache is not None:
            assert cache.hits >= count // 9 and cache.nbytes <= 1 << 20
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
    (first,) = engine.submit([4, 5, 6], greedy, max_tokens=6, returns=Returns(state=True))
    while engine.step():
        pass
    (second,) = engine.submit(first.pending, greedy, max_tokens=6, state=first.state)
    while engine.step():
        pass
    whole = one_by_one(model, [([4, 5, 6], greedy, 12)])[0]
    assert [t.id for t in first] + [t.id for t in second] == whole


def test_the_prompts_own_log_probabilities(model):
    ids, engine = [3, 1, 4, 1, 5, 9, 2, 6], Engine(model, slots=1, prefill_chunk=3)
    (stream,) = engine.submit(ids, max_tokens=1, returns=Returns(top=2, prompt=True))
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
    with pytest.raises(Full, match=r"too many requests are waiting already \(1\)"):
        engine.submit([1])
    for arguments, words in (
        (dict(ids=[]), "at least one token"),
        (dict(ids=[61]), "token ids must be from 0 to 60, got 61"),
        (dict(ids=[1], n=3), "n must be from 1 to 2, the engine's slots, got 3"),
        (dict(ids=[1], max_tokens=0), "`max_tokens=0`: must be at least 1"),
    ):
        with refuses(words):
            engine.submit(**arguments)


def run(engine) -> None:
    while engine.step():
        pass


def greedy(model, ids, n) -> list[int]:
    return one_by_one(model, [(ids, SamplingParams(temperature=0), n)])[0]


class Only:
    """Constraint that allows one token, and fails on request."""

    eos_id, complete = 60, False

    def __init__(self, token=7, **fails):
        self.token, self.fails, self.accepted = token, fails, 0

    def mask(self):
        if "mask" in self.fails:
            raise self.fails["mask"]
        return self.fails.get("returns", torch.arange(61) == self.token)

    def accept(self, token):
        self.accepted += 1
        if self.accepted == self.fails.get("accept"):
            raise RuntimeError("no more")


BROKEN = {
    "mask-raises": (dict(mask=KeyError("x")), KeyError, 0),
    "accept-raises": (dict(accept=3), RuntimeError, 2),
    "nothing-allowed": (dict(returns=torch.zeros(61, dtype=torch.bool)), ValueError, 0),
    "mask-too-long": (dict(returns=torch.ones(62, dtype=torch.bool)), ValueError, 0),
    "mask-of-floats": (dict(returns=torch.ones(61)), ValueError, 0),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_constraint_that_fails_ends_its_own_request_alone(case, model):
    fails, kind, before = BROKEN[case]
    engine, wanted = Engine(model, slots=3), SamplingParams(temperature=0)
    (first,) = engine.submit([1, 2], wanted, max_tokens=9)
    (broken,) = engine.submit([3], constraint=lambda: Only(**fails), max_tokens=9)
    (last,) = engine.submit([5, 6], wanted, max_tokens=9)
    run(engine)
    tokens = iter(broken)
    assert [next(tokens).id for _ in range(before)] == [7] * before
    with pytest.raises(kind):
        next(tokens)
    assert broken.reason == "error" and engine.taken == 0
    assert [[t.id for t in s] for s in (first, last)] == [greedy(model, [1, 2], 9), greedy(model, [5, 6], 9)]


def test_a_constraint_says_what_comes_and_when_it_is_over(model):
    class Three(Only):
        @property
        def complete(self):
            return self.accepted == 3

    engine = Engine(model, slots=4)
    streams = engine.submit([1], SamplingParams(seed=1), constraint=Three, n=2)
    (ended,) = engine.submit([1], constraint=lambda: Only(60))  # its end: not given out
    (short,) = engine.submit([1], constraint=lambda: Only(returns=torch.arange(9) == 8), max_tokens=2)
    run(engine)
    assert [[t.id for t in s] for s in streams] == [[7] * 3] * 2 and {s.reason for s in streams} == {"stop"}
    assert list(ended) == [] and ended.reason == "stop"
    assert [t.id for t in short] == [8, 8]


def test_a_listener_that_fails_is_cancelled_and_the_others_hear_all(model):
    heard = []

    def gone(item):
        heard.append(item)
        if len(heard) == 2:
            raise RuntimeError("event loop is closed")

    engine = Engine(model, slots=2)
    (bad,) = engine.submit([1], deliver=[gone])
    (good,) = engine.submit([2], SamplingParams(temperature=0), max_tokens=8)
    run(engine)
    assert bad.reason == "cancelled" and len(heard) == 3 and heard[-1] is None
    assert [t.id for t in good] == greedy(model, [2], 8)


def test_a_state_full_of_nan_ends_its_own_request_alone(model):
    engine = Engine(model, slots=2)
    (first,) = engine.submit([1, 2], returns=Returns(state=True), max_tokens=3)
    run(engine)
    for x in first.state.named().values():
        x.fill_(float("nan"))
    (bad,) = engine.submit([1], state=first.state)
    (good,) = engine.submit([2], SamplingParams(temperature=0), max_tokens=8)
    run(engine)
    with pytest.raises(ArithmeticError, match="not finite"):
        list(bad)
    assert [t.id for t in good] == greedy(model, [2], 8)


@pytest.mark.parametrize("where", ["read", "decode", "join", "pick"])
def test_errors_of_the_model_reach_those_concerned_and_the_engine_goes_on(where, model, monkeypatch):
    engine, hidden = Engine(model, slots=4), model.hidden
    (running,) = engine.submit([1], SamplingParams(temperature=0), max_tokens=20)
    engine.step()

    def fails(ids, state=None, **how):
        if (where == "read") == (ids.shape[1] > 2) and where not in ("join", "pick"):
            raise RuntimeError("no memory")
        return hidden(ids, state, **how)

    def no_memory(*args):
        raise MemoryError("no memory")

    (reading,) = engine.submit([1, 2, 3, 4], max_tokens=5)
    with monkeypatch.context() as patch:
        patch.setattr(model, "hidden", fails)
        if where == "join":
            patch.setattr(type(engine.pool), "put", no_memory)
        if where == "pick":
            patch.setattr("retentive.infer.engine.pick", no_memory)
        engine.step()
    concerned, free = (running, reading) if where in ("decode", "pick") else (reading, running)
    with pytest.raises((RuntimeError, MemoryError), match="no memory"):
        list(concerned)
    assert concerned.reason == "error"
    (after,) = engine.submit([2], SamplingParams(temperature=0), max_tokens=8)
    run(engine)
    assert [t.id for t in after] == greedy(model, [2], 8) and engine.taken == 0
    if free is running:
        assert [t.id for t in free] == greedy(model, [1], 20)


def test_cancelling_one_of_n_leaves_the_others(model):
    for when in (0, 1, 4):  # waiting, reading, running
        engine = Engine(model, slots=3, prefill_chunk=1)
        streams = engine.submit([5, 6, 7], SamplingParams(seed=3), max_tokens=9, n=3)
        for _ in range(when):
            engine.step()
        streams[1].cancel()
        run(engine)
        want = one_by_one(model, [([5, 6, 7], SamplingParams(seed=3 + i), 9) for i in range(3)])
        assert [[t.id for t in streams[i]] for i in (0, 2)] == [want[0], want[2]]
        assert streams[1].reason == "cancelled" and engine.taken == 0


def test_a_cancelled_stream_leaves_its_state_where_asked_for(model):
    """A reply cut at a stop string can continue from that state."""
    engine, params = Engine(model, slots=2), SamplingParams(temperature=0)
    (first,) = engine.submit([4, 5, 6], params, returns=Returns(state=True))
    for _ in range(5):
        engine.step()
    first.cancel()
    run(engine)
    said = [t.id for t in first]
    (second,) = engine.submit(first.pending, params, max_tokens=6, state=first.state)
    run(engine)
    assert said + [t.id for t in second] == greedy(model, [4, 5, 6], len(said) + 6)
    assert [t.id for t in generate(model, first.pending, params, max_tokens=6, state=first.state)] == [
        *greedy(model, [4, 5, 6], len(said) + 6)[len(said) :]
    ]


def test_a_short_prompt_does_not_wait_for_a_long_one(model):
    engine = Engine(model, slots=3, prefill_chunk=10)
    engine.submit([1] * 500, max_tokens=1)
    engine.step()
    (short,) = engine.submit([2, 3, 4], SamplingParams(temperature=0), max_tokens=2)
    for _ in range(3):
        engine.step()
    assert short.reason == "length" and engine.taken == 1
    for n in range(40):  # nor does the long one wait for ever for short ones
        engine.submit([3, n], max_tokens=1)
        engine.submit([4, n] * 20, max_tokens=1)
    for _ in range(150):
        engine.step()
    assert all(len(p.ids) != 500 for p in engine.reading)
    run(engine)


@pytest.mark.parametrize("threaded", [True, False])
@pytest.mark.parametrize("drain", [True, False])
def test_closing_finishes_or_cancels_what_is_at_hand(model, drain, threaded):
    engine = Engine(model, slots=2, prefill_chunk=4)
    if threaded:
        engine.start()
    streams = [engine.submit([n + 1] * 30, max_tokens=20 if drain else None)[0] for n in range(6)]
    engine.close(drain=drain)
    assert {s.reason for s in streams} <= ({"length"} if drain else {"cancelled"})
    assert engine.taken == 0 and not engine.queue
    if drain:
        assert [len(list(s)) for s in streams] == [20] * 6


@pytest.mark.slow
def test_many_threads_submit_and_cancel(model):
    todo, engine, wrong = requests(48), Engine(model, slots=6, prefill_chunk=16, cache=PrefixCache(1 << 18)).start(), []

    def work(part):
        for n, (ids, params, length) in enumerate(part):
            (stream,) = engine.submit(ids, params, max_tokens=None if n % 3 == 1 else length)
            if n % 3 == 1:
                next(iter(stream))
                stream.cancel()
                list(stream)
            elif [t.id for t in stream] != one_by_one(model, [(ids, params, length)])[0]:
                wrong.append(ids)

    threads = [threading.Thread(target=work, args=(todo[n::6],)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.close()
    assert not wrong and engine.taken == 0


def test_a_state_of_something_else_is_refused(model, refuses):
    engine = Engine(model)
    other = build(retnet(vocab_size=61, dim=16, layers=1, heads=1)).init_state(1)
    for state in (other, build(twin(other_config())).init_state(1), model.init_state(2)):
        with refuses("not that of one sequence of this model"):
            engine.submit([1], state=state)
    with refuses("top must be from 0 to the 61 tokens"):
        engine.submit([1], returns=Returns(top=62))


def other_config() -> ModelConfig:
    return retnet(vocab_size=61, dim=48, layers=2, heads=2)


@pytest.mark.slow
def test_two_hundred_mixed_requests_are_token_exact(model):
    todo, rng = requests(200), random.Random(2)
    engine, streams = Engine(model, slots=16, prefill_chunk=64, cache=PrefixCache(1 << 22, every=16)), []
    waiting = list(todo)
    while waiting or engine.taken or engine.queue:
        for _ in range(rng.randrange(5)):
            if waiting:
                ids, params, n = waiting.pop(0)
                streams += engine.submit(ids, params, max_tokens=n)
        engine.step()
    assert [[t.id for t in s] for s in streams] == one_by_one(model, todo)
