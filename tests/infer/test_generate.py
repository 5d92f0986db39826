"""Generation against the naive loop that reads the whole text anew for every token."""

import pytest
import torch

from retentive.infer import SamplingParams, generate
from retentive.infer.generate import prefill
from retentive.infer.sample import Sampler
from retentive.models import ARCHITECTURES, build, retnet, transformer
from tests.configs import hybrid

SMALL = dict(vocab_size=31, dim=24, layers=2, heads=2)
CONFIGS = {
    "retnet": retnet(**SMALL),
    "retnet-paper": retnet(**SMALL, **ARCHITECTURES["retnet-paper"]),
    "twin": transformer(**SMALL),
    "twin-window": transformer(**SMALL, attention_window=3, forget_gate=True, qk_norm=True),
    "hybrid-window": hybrid(**SMALL, attention_every=2, attention_window=5),
}
GREEDY = SamplingParams(temperature=0)
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
# 53 bits are 1e-16, 24 bits 6e-8: two layers and norms cost thousands of that, as between decoding and rescoring
# (tests/models/test_decoding.py); in float32 the softmax of the twin and of the logits besides
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}

models = pytest.mark.parametrize("name", CONFIGS)
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32"])


def make(name, dtype=torch.float64):
    """A model with matrices N(0, 1/width), so that every part matters and the likeliest tokens are distinct."""
    model = build(CONFIGS[name])
    for p in model.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5) if p.ndim == 2 else torch.nn.init.uniform_(p, 0.5, 1.5)
    return model.to(dtype).eval()


@torch.no_grad()
def naive(model, ids, params, count) -> list[int]:
    """Tokens of a loop without any state."""
    sampler, ids = Sampler(params, torch.tensor(ids), 31), list(ids)
    for _ in range(count):
        logits, _ = model(torch.tensor([ids]))
        ids.append(sampler(logits[0, -1])[0])
    return ids[-count:]


def ids_of(tokens) -> list[int]:
    return [token.id for token in tokens]


@models
@dtypes
@pytest.mark.parametrize(
    "params", [GREEDY, SamplingParams(seed=5, top_p=0.9, repetition_penalty=1.2)], ids=["greedy", "sampled"]
)
def test_tokens_are_those_of_the_naive_loop(name, dtype, params):
    model = make(name, dtype)
    got = ids_of(generate(model, PROMPT, params, max_tokens=40))
    assert got == naive(model, PROMPT, params, 40)
    assert len(set(got)) > 2, "a model that repeats itself would prove little"


@models
@dtypes
@torch.no_grad()
def test_logprobs_are_those_of_rescoring(name, dtype):
    model = make(name, dtype)
    tokens = list(generate(model, PROMPT, SamplingParams(seed=1, temperature=2.0), max_tokens=30))
    logits, _ = model(torch.tensor([PROMPT + ids_of(tokens)]))
    want = logits[0].float().log_softmax(-1)[len(PROMPT) - 1 : -1].gather(1, torch.tensor(ids_of(tokens))[:, None])
    # logprobs are float32 in any case
    assert [t.logprob for t in tokens] == pytest.approx(want[:, 0].tolist(), rel=max(TOLERANCE[dtype], 1e-6))


@models
@pytest.mark.parametrize("split", [1, 4, 7], ids=lambda n: f"split{n}")
def test_a_prompt_may_come_in_two_parts(name, split):
    model = make(name)
    want = list(generate(model, PROMPT, GREEDY, max_tokens=12))
    _, state = prefill(model, torch.tensor([PROMPT[:split]]))
    got = list(generate(model, PROMPT[split:], GREEDY, max_tokens=12, state=state))
    assert ids_of(got) == ids_of(want)


@models
def test_a_copy_of_the_state_answers_as_often_as_asked(name):
    model = make(name)
    _, state = prefill(model, torch.tensor([PROMPT]))
    first, again = (ids_of(generate(model, [7], GREEDY, max_tokens=9, state=state.clone())) for _ in range(2))
    assert first == again == naive(model, [*PROMPT, 7], GREEDY, 9)


@models
@pytest.mark.parametrize("chunk", [1, 3, 8, 100], ids=lambda n: f"chunk{n}")
@torch.no_grad()
def test_prefill_in_chunks_of_any_size(name, chunk, same):
    """Its state is like any other: the model can continue from it outside of generation too."""
    model, ids = make(name), torch.tensor([PROMPT])
    logits, state = prefill(model, ids, chunk=chunk)
    want, end = model(ids)
    same(logits, want[:, -1], 1e-12)
    assert state.position.tolist() == end.position.tolist() == [8]
    next_ = torch.tensor([[7]])
    same(model(next_, state)[0], model(next_, end)[0], 1e-12)


@pytest.mark.slow
def test_memory_is_flat_for_retnet_and_windows_and_grows_for_the_twin(monkeypatch):
    def sizes(name) -> list[int]:
        model, held = make(name, torch.float32), []
        hidden = model.hidden

        def watched(*args, **kwargs):
            x, state = hidden(*args, **kwargs)
            held.append(state.nbytes)
            return x, state

        monkeypatch.setattr(model, "hidden", watched)
        assert len(list(generate(model, PROMPT, SamplingParams(seed=0), max_tokens=300))) == 300
        return held

    for name in ("retnet", "retnet-paper"):
        held = sizes(name)
        assert len(held) >= 300 and len(set(held[1:])) == 1  # after the prompt, the state opens a ring once and for all
    for name in ("twin-window", "hybrid-window"):  # the prompt of 8 fills the window
        held = sizes(name)
        assert len(held) >= 300 and len(set(held[1:])) == 1
    held = sizes("twin")
    assert held[-1] > 20 * held[0]


@models
def test_stop_ids_end_it_and_are_not_given_out(name):
    model = make(name)
    want = ids_of(generate(model, PROMPT, GREEDY, max_tokens=20))
    stop, never = want[7], next(id for id in range(31) if id not in want)
    got = ids_of(generate(model, PROMPT, GREEDY, max_tokens=20, stop_ids=[stop, never]))
    assert got == want[: want.index(stop)]


def test_tokens_end_at_max_tokens_or_not_at_all():
    model = make("retnet")
    assert [len(list(generate(model, PROMPT, GREEDY, max_tokens=n))) for n in (0, 1, 5)] == [0, 1, 5]
    endless = generate(model, PROMPT, GREEDY)
    assert [next(endless).id for _ in range(60)] == ids_of(generate(model, PROMPT, GREEDY, max_tokens=60))


def test_the_last_token_is_not_read(monkeypatch):
    """Its logits are not needed: n tokens cost the prompt and n - 1 steps."""
    model, calls = make("retnet"), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, *a, **how: calls.append(ids.shape[1]) or hidden(ids, *a, **how))
    list(generate(model, PROMPT, GREEDY, max_tokens=4))
    assert calls == [8, 1, 1, 1]


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, lambda x: torch.tensor([x], dtype=torch.int32)])
def test_prompts_are_sequences_or_tensors(kind):
    model = make("retnet")
    assert ids_of(generate(model, kind(PROMPT), GREEDY, max_tokens=3)) == naive(model, PROMPT, GREEDY, 3)


def test_no_gradients_and_no_autocast_are_needed():
    model = make("retnet", torch.bfloat16)
    tokens = list(generate(model, PROMPT, SamplingParams(seed=0), max_tokens=5))
    assert len(tokens) == 5 and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("empty", [[], torch.tensor([])], ids=["list", "tensor"])
def test_an_empty_prompt_is_refused_at_once(empty, refuses):
    with refuses("generation needs at least one token to begin from, got an empty prompt"):
        generate(make("retnet"), empty)


@pytest.mark.parametrize(("ids", "got"), [([3, 31], 31), ([-1, 5], -1)], ids=["high", "low"])
def test_ids_outside_the_vocabulary_are_refused_at_once(ids, got, refuses):
    with refuses(f"token ids must be from 0 to 30, got {got}"):
        generate(make("retnet"), ids)


@pytest.mark.parametrize(("ids", "got"), [([1.5], "float32"), (torch.ones(2, dtype=torch.bool), "bool")])
def test_ids_that_are_no_integers_are_refused_at_once(ids, got, refuses):
    with refuses(f"token ids must be integers, got {got}", TypeError):
        generate(make("retnet"), ids)


def test_first_ids_bind_the_first_token_only():
    model = make("retnet")
    free = ids_of(generate(model, PROMPT, GREEDY, max_tokens=10))
    other = next(id for id in range(31) if id != free[0])
    got = ids_of(generate(model, PROMPT, GREEDY, max_tokens=10, first_ids=[other]))
    assert got == [other, *naive(model, [*PROMPT, other], GREEDY, 9)]
    assert ids_of(generate(model, PROMPT, GREEDY, max_tokens=10, first_ids=range(31))) == free
    rescored = model(torch.tensor([PROMPT]))[0][0, -1].float().log_softmax(-1)
    (token,) = generate(model, PROMPT, GREEDY, max_tokens=1, first_ids=[other])
    # float32 logprobs
    assert token.logprob == pytest.approx(rescored[other].item(), rel=1e-6), "the model's own, before any filter"
