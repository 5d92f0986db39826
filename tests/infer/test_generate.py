"""Generation against the naive loop that reads the whole text anew for every token; its text against the tokens'."""

import pytest
import torch

from retentive.data.tokenizer import ByteTokenizer, train_bpe
from retentive.infer import SamplingParams, Token, generate
from retentive.infer.generate import prefill, stream_text, write_on
from retentive.infer.sample import Sampler
from retentive.models import RetNetConfig, TransformerConfig, build

SMALL = dict(vocab_size=31, dim=24, layers=2, heads=2)
CONFIGS = {
    "retnet": RetNetConfig(**SMALL),
    "retnet-gated": RetNetConfig(**SMALL, decay="gated", score_norm=False),
    "twin": TransformerConfig(**SMALL),
}
GREEDY = SamplingParams(temperature=0)
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
# 53 bits are 1e-16, 24 bits 6e-8: two layers and norms cost thousands of that, as between decoding and rescoring
# (tests/models/test_decoding.py); in float32 the softmax of the twin and of the logits besides
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}

models = pytest.mark.parametrize("name", CONFIGS)
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32"])


def make(name, dtype=torch.float64):
    """Matrices N(0, 1/width), so that every part matters and the likeliest tokens stand apart."""
    model = build(CONFIGS[name])
    for p in model.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5) if p.ndim == 2 else torch.nn.init.uniform_(p, 0.5, 1.5)
    return model.to(dtype).eval()


@torch.no_grad()
def naive(model, ids, params, count) -> list[int]:
    """The tokens of a loop without any state."""
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
    """Its state is like any other: the model may go on from it outside of generation too."""
    model, ids = make(name), torch.tensor([PROMPT])
    logits, state = prefill(model, ids, chunk=chunk)
    want, end = model(ids)
    same(logits, want[:, -1], 1e-12)
    assert state.position.tolist() == end.position.tolist() == [8]
    next_ = torch.tensor([[7]])
    same(model(next_, state)[0], model(next_, end)[0], 1e-12)


def test_memory_is_flat_for_retnet_and_grows_for_the_twin(monkeypatch):
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

    for name in ("retnet", "retnet-gated"):
        held = sizes(name)
        assert len(held) >= 300 and len(set(held[1:])) == 1  # after the prompt, the state opens a ring once and for all
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
    """Its logits are of no use: n tokens cost the prompt and n - 1 steps."""
    model, calls = make("retnet"), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, state: (calls.append(ids.shape[1]), hidden(ids, state))[1])
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


@pytest.mark.parametrize(("ids", "got"), [([3, 31], "3 to 31"), ([-1, 5], "-1 to 5")], ids=["high", "low"])
def test_ids_outside_the_vocabulary_are_refused_at_once(ids, got, refuses):
    with refuses(f"token ids must be in [0, 31), got {got}"):
        generate(make("retnet"), ids)


BYTES = ByteTokenizer()


def stream(parts, *, stop=(), tokenizer=BYTES) -> list[str]:
    return list(stream_text((Token(id, 0.0) for id in parts), tokenizer, stop=stop))


def encoded(text: str) -> list[int]:
    return BYTES.encode(text)


# text, stop strings, what is to come out; every byte is a token, so every stop string crosses borders
STOPS = {
    "none": ("plain text", [], "plain text"),
    "not-there": ("plain text", ["xyz", "text!"], "plain text"),
    "in-the-middle": ("one. two. three.", [". t"], "one"),
    "at-the-start": ("END and more", ["END"], ""),
    "at-the-end": ("some END", ["END"], "some "),
    "the-earlier-of-two": ("a b c d", ["c", "b"], "a "),
    "begun-and-broken-off": ("abababac.", ["abac"], "abab"),
    "begun-at-the-end": ("the EN", ["END"], "the EN"),
    "begun-twice": ("\n\nuser\n\n\nUser: x", ["\n\nUser:"], "\n\nuser\n"),
    "of-several-bytes": ("café 猫が好き", ["猫が"], "café "),
    "one-letter": ("abc", ["b"], "a"),
    "other-text-and-end-of-text-tokens": ("a" + "b" * 50, ["bc"], "a" + "b" * 50),
}


@pytest.mark.parametrize("name", STOPS)
def test_text_ends_before_the_first_stop_string(name):
    text, stop, want = STOPS[name]
    assert "".join(stream(encoded(text), stop=stop)) == want


@pytest.mark.parametrize("name", [n for n in STOPS if n != "none"])
def test_no_part_of_a_stop_string_is_ever_shown(name):
    """Whatever the borders: larger tokens stop in the same place."""
    text, stop, want = STOPS[name]
    tokenizer = train_bpe([text, text], 257 + 40)
    assert "".join(stream(tokenizer.encode(text), stop=stop, tokenizer=tokenizer)) == want


def test_text_is_held_back_only_while_a_stop_string_may_have_begun():
    assert stream(encoded("a<b<|c"), stop=["<|end|>"]) == ["a", "<b", "<|c"]
    assert stream(encoded("ab")) == ["a", "b"]


def test_nothing_is_read_after_the_stop():
    def tokens():
        for id in encoded("stop here"):
            yield Token(id, 0.0)
        raise AssertionError("read on")

    assert "".join(stream_text(tokens(), BYTES, stop=["here"])) == "stop "


@pytest.mark.parametrize("text", ["naïve café", "猫が好き", "🙂👩‍👩‍👧", "añb🙂c"])
def test_characters_of_several_tokens_come_whole(text):
    pieces = stream(encoded(text))
    assert "".join(pieces) == text and len(pieces) == len(text)


def test_a_character_that_never_ends_comes_at_the_end():
    assert stream(encoded("ab猫")[:-1]) == ["a", "b", "\ufffd"]
    assert "".join(stream([0x61, 0xFF, 0x62])) == "a\ufffdb"


def test_the_end_of_text_and_an_empty_stream_are_no_text():
    assert stream([]) == [] and stream([*encoded("a"), 256]) == ["a"]


def test_an_empty_stop_string_is_refused(refuses):
    with refuses("a stop string must not be empty"):
        stream(encoded("abc"), stop=["x", ""])


def text_model(vocab_size: int):
    """Small, and in the dtype that makes choices plain."""
    return build(RetNetConfig(vocab_size=vocab_size, dim=24, layers=1, heads=2)).double().eval()


LEARNT = train_bpe(["the fox then saw the other fox over there " * 9], 280)
PROMPTS = ["", "t", "the ", "the fox ", "th", "ov", "The fox\n", "naïve", "猫", "🙂 "]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("tokenizer", [BYTES, LEARNT], ids=["bytes", "bpe"])
def test_what_is_written_begins_with_the_prompt(tokenizer, prompt):
    for seed in range(5):
        params = SamplingParams(seed=seed)
        text = "".join(write_on(text_model(tokenizer.vocab_size), tokenizer, prompt, params, max_tokens=6))
        assert text.startswith(prompt)


def test_the_last_token_of_a_prompt_may_become_a_longer_one():
    """ "the " ends in a space, and the tokenizer has learnt spaces as the beginnings of words."""
    ids = LEARNT.encode("the ")
    longer = [i for i in range(LEARNT.vocab_size) if LEARNT.decode([i]).startswith(" ")]
    assert LEARNT.decode(ids[-1:]) == " " and len(longer) > 1
    model, first = text_model(LEARNT.vocab_size), [LEARNT.eos_id, *ids[:-1]]
    want = list(generate(model, first, GREEDY, max_tokens=6, stop_ids=[LEARNT.eos_id], first_ids=longer))
    assert want[0].id in longer
    text = "".join(write_on(model, LEARNT, "the ", GREEDY, max_tokens=5))
    assert text == "the" + LEARNT.decode(ids_of(want))


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


def test_a_stop_string_is_looked_for_in_what_is_new():
    """The prompt's end is written anew, but it is still the prompt's."""
    text = "".join(write_on(text_model(257), BYTES, "one line\n", GREEDY, max_tokens=4, stop=["\n"]))
    assert text.startswith("one line\n")


def test_max_tokens_counts_what_is_new():
    text = "".join(write_on(text_model(257), BYTES, "abc", SamplingParams(seed=0), max_tokens=1))
    assert text.startswith("abc") and len(text) == 4
