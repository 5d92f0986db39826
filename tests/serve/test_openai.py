"""The official client against the server. The oracle is `generate`, alone with the model: the same text, always."""

import json
import sys
import threading

import openai
import pytest
import torch

from retentive.data.tokenizer import ByteTokenizer
from retentive.serve import async_engine

START = [256]
SAID = [{"role": "user", "content": "Who is there?"}]
CHAT = [*START, *b"User: Who is there?\nAssistant:"]
"""What the plain template makes of SAID."""
GREEDY, DRAWN = {"temperature": 0}, {"temperature": 0.9, "top_p": 0.95, "seed": 7}


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_chat_is_what_the_model_says(server, params):
    want = server.text(CHAT, max_tokens=40, **params)
    reply = server.client().chat.completions.create(model=server.service.name, messages=SAID, max_tokens=40, **params)
    assert reply.choices[0].message.content == want and reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason == "length" and reply.object == "chat.completion"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (31, 40, 71)


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_streamed_chat_joins_to_the_same(server, params, monkeypatch):
    monkeypatch.setattr(async_engine, "TICK", 0)  # a model so small is done before there would be ten of them
    want = server.text(CHAT, max_tokens=60, **params)
    with server.client().chat.completions.create(
        model=server.service.name, messages=SAID, max_completion_tokens=60, stream=True,
        stream_options={"include_usage": True}, **params,
    ) as chunks:  # fmt: skip
        chunks = list(chunks)
    assert len(chunks) > 10 and {c.object for c in chunks} == {"chat.completion.chunk"}
    assert len({c.id for c in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == want
    assert [c.choices[0].finish_reason for c in chunks[-3:-1]] == [None, "length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 60


def test_completions_of_texts_and_of_ids(server):
    client, name = server.client(), server.service.name
    for prompt, ids in (("Once", [[*START, *b"Once"]]), ([79, 110], [[79, 110]]), (["a", "b"], [[256, 97], [256, 98]])):
        reply = client.completions.create(model=name, prompt=prompt, max_tokens=20, **DRAWN)
        assert [c.text for c in reply.choices] == [server.text(each, max_tokens=20, **DRAWN) for each in ids]
        assert [c.index for c in reply.choices] == list(range(len(ids)))
        assert reply.usage.prompt_tokens == sum(map(len, ids))
    reply = client.completions.create(model=name, prompt=[[1, 2, 3], [4]], **GREEDY)
    assert [c.text for c in reply.choices] == [server.text(each, max_tokens=16, **GREEDY) for each in ([1, 2, 3], [4])]


def test_a_streamed_completion_ends_as_openai_does(server):
    body = {"prompt": "Once", "max_tokens": 9, "stream": True, **GREEDY}
    with server.http().stream("POST", "/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: {") for line in lines[:-1]) and lines[-1] == "data: [DONE]"


def test_n_choices_have_seeds_in_a_row(server):
    reply = server.client().chat.completions.create(
        model=server.service.name, messages=SAID, max_tokens=12, n=3, seed=20
    )
    assert [c.message.content for c in reply.choices] == [
        server.text(CHAT, max_tokens=12, seed=seed) for seed in (20, 21, 22)
    ]
    assert reply.usage.prompt_tokens == len(CHAT) and reply.usage.completion_tokens == 36
    with server.client().completions.create(
        model=server.service.name, prompt="ab", max_tokens=12, n=2, seed=5, stream=True
    ) as chunks:
        texts = ["", ""]
        for chunk in chunks:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
    assert texts == [server.text([256, 97, 98], max_tokens=12, seed=seed) for seed in (5, 6)]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it(server, stream):
    whole = server.text(CHAT, max_tokens=60, **DRAWN)
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


def test_an_end_of_text_ends_it(server):
    bias = {"256": 100}  # the end, at once
    reply = server.client().completions.create(model=server.service.name, prompt="x", logit_bias=bias, max_tokens=9)
    assert reply.choices[0].text == "" and reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens == 0


def test_logit_bias_and_our_own_parameters(server):
    reply = server.client().completions.create(
        model=server.service.name, prompt="x", logit_bias={"65": 100}, max_tokens=5, **GREEDY
    )
    assert reply.choices[0].text == "AAAAA"
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.3}
    reply = server.client().completions.create(
        model=server.service.name, prompt="x", max_tokens=20, seed=3, extra_body=extra
    )
    assert reply.choices[0].text == server.text([256, 120], max_tokens=20, seed=3, **extra)


def test_the_same_seed_gives_the_same_and_no_seed_another(server):
    def ask(**seed):
        return server.client().completions.create(model=server.service.name, prompt="x", max_tokens=30, **seed)

    assert ask(seed=1).choices[0].text == ask(seed=1).choices[0].text != ask(seed=2).choices[0].text
    assert ask().choices[0].text != ask().choices[0].text  # of 257^30 or so


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
        want = logprobs(server, [*CHAT, *made])[len(CHAT) + len(made) - 2]
        top = want.topk(3)
        assert entry.logprob == pytest.approx(float(want[made[-1]]), **CLOSE)
        assert [t.logprob for t in entry.top_logprobs] == pytest.approx(top.values.tolist(), **CLOSE)
        assert entry.top_logprobs[0].token == entry.token  # greedy
    assert "".join(e.token for e in choice.logprobs.content) == choice.message.content
    assert len(choice.logprobs.content) == 8


def test_logprobs_stop_where_the_text_does(server):
    whole = server.text(CHAT, max_tokens=40, **GREEDY)
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


def test_many_at_once_get_their_own(server):
    def ask(n: int) -> None:
        body = {"prompt": f"Number {n}", "max_tokens": 5 + n, "seed": n, "stream": n % 2 == 0}
        reply = server.client().completions.create(model=server.service.name, **body)
        got[n] = "".join(c.choices[0].text for c in reply) if body["stream"] else reply.choices[0].text

    got: dict[int, str] = {}
    threads = [threading.Thread(target=ask, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {n: server.text([256, *f"Number {n}".encode()], max_tokens=5 + n, seed=n) for n in range(20)}
    assert server.idle()


def test_a_prompt_read_before_is_cached(serve):
    server = serve(slots=2)
    body = {"model": server.service.name, "prompt": "x" * 600, "max_tokens": 2, **GREEDY}
    first, second = (server.client().completions.create(**body) for _ in range(2))
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens == 600
    assert first.choices[0].text == second.choices[0].text


def test_a_folder_keeps_what_was_read_for_the_next_server(serve, tmp_path):
    bounds = {"cache": 9000, "cache_folder": tmp_path / "cache"}  # room for one state
    first = serve(**bounds)
    body = {"model": "retnet", "max_tokens": 2, **GREEDY}
    want = first.client().completions.create(prompt="x" * 600, **body).choices[0].text
    first.client().completions.create(prompt="y" * 600, **body)
    second = serve(**bounds).client().completions.create(prompt="x" * 600, **body)
    assert second.usage.prompt_tokens_details.cached_tokens >= 512 and second.choices[0].text == want


def test_the_models(server):
    client, name = server.client(), server.service.name
    assert [m.id for m in client.models.list()] == [name]
    assert client.models.retrieve(name).owned_by == "retentive"


def test_content_in_parts_is_joined(server):
    parts = [{"type": "text", "text": "Who is"}, {"type": "text", "text": " there?"}]
    reply = server.client().chat.completions.create(
        model=server.service.name, messages=[{"role": "user", "content": parts}], max_tokens=10, **GREEDY
    )
    assert reply.choices[0].message.content == server.text(CHAT, max_tokens=10, **GREEDY)


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}


def test_json_by_a_schema(server):
    pytest.importorskip("llguidance", reason="structured output needs pip install 'retentive[structured]'")
    form = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": SCHEMA}}
    reply = server.client().chat.completions.create(
        model=server.service.name, messages=SAID, response_format=form, max_tokens=200, n=2, seed=1
    )
    for choice in reply.choices:
        found = json.loads(choice.message.content)
        assert set(found) == {"name", "old"} and len(found["name"]) <= 8 and isinstance(found["old"], bool)
        assert choice.finish_reason == "stop"
    # a session goes on after it
    body = {"messages": SAID, "response_format": form, "max_tokens": 200, "seed": 1, "session": "json"}
    for _ in range(2):
        got = server.http().post("/v1/chat/completions", json=body).json()
        assert set(json.loads(got["choices"][0]["message"]["content"])) == {"name", "old"}
    server.http().delete("/v1/sessions/json")


def test_any_json_object(server):
    pytest.importorskip("llguidance", reason="structured output needs pip install 'retentive[structured]'")
    # a random model never ends by itself: braces are made likely
    reply = server.client().chat.completions.create(
        model=server.service.name, messages=SAID, response_format={"type": "json_object"}, max_tokens=50,
        logit_bias={str(ord("}")): 100}, **GREEDY,
    )  # fmt: skip
    assert json.loads(reply.choices[0].message.content) == {}


def test_a_schema_that_is_none_is_refused(server):
    pytest.importorskip("llguidance", reason="structured output needs pip install 'retentive[structured]'")
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "wizard"}}}
    with pytest.raises(openai.BadRequestError) as refused:
        server.client().chat.completions.create(model=server.service.name, messages=SAID, response_format=form)
    assert refused.value.param == "response_format" and "\n" not in str(refused.value.message)


def test_a_missing_extra_is_named(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(openai.BadRequestError, match=r"retentive\[structured\]"):
        server.client().chat.completions.create(
            model=server.service.name, messages=SAID, response_format={"type": "json_object"}
        )
