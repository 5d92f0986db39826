"""Output of a choice: text up to its stop, log probabilities of just that text, and the echo of its prompt."""

from types import SimpleNamespace

import pytest
import torch

from retentive.data.tokenizer import ByteTokenizer
from retentive.infer import Token
from retentive.infer.text import Text
from retentive.serve.choices import Choice
from tests.serve.asked import CHAT_IDS, DRAWN, GREEDY, SAID, START


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it(server, stream):
    whole = server.text(CHAT_IDS, max_tokens=60, **DRAWN)
    stop = whole[20:23]
    want = whole[: whole.index(stop)]
    for given in (stop, ["never, not this", stop]):
        reply = server.client().chat.completions.create(
            model=server.service.name, messages=SAID, max_tokens=60, stop=given, stream=stream, **DRAWN
        )
        if stream:
            chunks = list(reply)
            assert "".join(c.choices[0].delta.content or "" for c in chunks) == want
            assert chunks[-1].choices[0].finish_reason == "stop"
        else:
            assert reply.choices[0].message.content == want and reply.choices[0].finish_reason == "stop"
            assert reply.usage.completion_tokens <= 26  # not the 60: it was stopped
    assert server.idle()


def logprobs(server, ids) -> torch.Tensor:
    """`[T,vocab]`: after each of the ids, by the model itself."""
    with torch.no_grad():
        return server.service.model(torch.tensor([ids]))[0][0].log_softmax(-1)


# float32, two layers summed in other orders
CLOSE = {"rel": 1e-4, "abs": 1e-4}


def test_logprobs_of_a_chat(server):
    reply = server.client().chat.completions.create(
        model=server.service.name, messages=SAID, max_tokens=8, logprobs=True, top_logprobs=3, **GREEDY
    )
    choice, made = reply.choices[0], list(b"")
    for entry in choice.logprobs.content:
        made += entry.bytes
        want = logprobs(server, [*CHAT_IDS, *made])[len(CHAT_IDS) + len(made) - 2]
        top = want.topk(3)
        assert entry.logprob == pytest.approx(float(want[made[-1]]), **CLOSE)
        assert [t.logprob for t in entry.top_logprobs] == pytest.approx(top.values.tolist(), **CLOSE)
        assert entry.top_logprobs[0].token == entry.token  # greedy
    assert "".join(e.token for e in choice.logprobs.content) == choice.message.content
    assert len(choice.logprobs.content) == 8


def test_logprobs_stop_where_the_text_does(server):
    whole = server.text(CHAT_IDS, max_tokens=40, **GREEDY)
    stop = whole[10:13]
    for stream in (False, True):
        reply = server.client().chat.completions.create(
            model=server.service.name, messages=SAID, max_tokens=40, logprobs=True, stop=stop, stream=stream, **GREEDY
        )
        choices = [c.choices[0] for c in reply] if stream else reply.choices
        entries = [e for c in choices if c.logprobs for e in c.logprobs.content]
        assert "".join(e.token for e in entries) == whole[: whole.index(stop)]


@pytest.mark.parametrize("prompt", ["The river", [82, 105, 118, 101, 114]], ids=["text", "ids"])
@pytest.mark.parametrize("max_tokens", [0, 4])
def test_echo_scores_the_prompt(server, prompt, max_tokens):
    """As lm-eval asks: token_logprobs and top_logprobs line up with the prompt's tokens, then the new ones."""
    reply = server.client().completions.create(
        model=server.service.name, prompt=prompt, echo=True, logprobs=2, max_tokens=max_tokens, **GREEDY
    )
    choice = reply.choices[0]
    sent = [*prompt.encode()] if isinstance(prompt, str) else prompt
    before = START if isinstance(prompt, str) else []
    made = [*ByteTokenizer().encode(choice.text)][len(sent) :]
    ids = [*before, *sent, *made]
    assert len(made) == max_tokens and choice.text.startswith(ByteTokenizer().decode(sent))
    assert choice.logprobs.tokens == [chr(i) for i in sent + made]
    assert choice.logprobs.text_offset == list(range(len(sent + made)))
    table = logprobs(server, ids)
    for n, (own, top) in enumerate(zip(choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True)):
        at = len(before) + n
        if at == 0:
            assert own is None and top is None
            continue
        assert own == pytest.approx(float(table[at - 1, ids[at]]), **CLOSE)
        assert max(top.values()) == pytest.approx(float(table[at - 1].max()), **CLOSE)
        assert (own == max(top.values())) == (int(table[at - 1].argmax()) == ids[at])
    assert reply.usage.completion_tokens == max_tokens


def test_echo_alone_gives_the_prompt_back(server):
    reply = server.client().completions.create(model=server.service.name, prompt=["ab", "c"], echo=True, max_tokens=0)
    assert [c.text for c in reply.choices] == ["ab", "c"] and reply.choices[0].finish_reason == "length"


@pytest.mark.parametrize(("trims", "given"), [(True, [None, None, "a", " b"]), (False, [" ", "\n", "a", " b"])])
def test_white_space_before_an_answer(trims, given):
    tokenizer, stream = ByteTokenizer(), SimpleNamespace(reason="stop")
    choice = Choice(0, SimpleNamespace(text=None), stream, tokenizer, Text(tokenizer), 9, logprobs=True, trims=trims)
    deltas = []
    for piece in (" ", "\n", "a", " b"):
        for id in tokenizer.encode(piece):
            choice.push(Token(id, -1.0), now=0.0)
        deltas.append(choice.delta())
    assert [delta and delta.text for delta in deltas] == given
    assert sum(len(delta.logprobs) for delta in deltas if delta) == 5  # each token's, at last
    choice.push(None, now=0.0)
    assert choice.delta().finish == "stop" and choice.delta().text == ""
