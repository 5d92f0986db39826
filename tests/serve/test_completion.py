"""The official client against the server. The oracle is `generate`, alone with the model: the same text, always."""

import json
import re
import socket
import sys
import threading
import time
from contextlib import ExitStack

import httpx
import openai
import pytest

from retentive.data.tokenizer import ByteTokenizer
from retentive.infer.requests import Full
from retentive.serve import async_engine, completion
from tests.serve.asked import CHAT, CHAT_IDS, DRAWN, ENDLESS, GREEDY, SAID, START, TEXT


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_chat_is_what_the_model_says(server, params):
    want = server.text(CHAT_IDS, max_tokens=40, **params)
    reply = server.client().chat.completions.create(model=server.service.name, messages=SAID, max_tokens=40, **params)
    assert reply.choices[0].message.content == want and reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason == "length" and reply.object == "chat.completion"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (31, 40, 71)


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_streamed_chat_joins_to_the_same(server, params, monkeypatch):
    want = server.text(CHAT_IDS, max_tokens=60, **params)
    monkeypatch.setattr(async_engine, "TICK", 0)
    # a model so small is done before the event loop has its turn ten times, on a busy machine
    engine = server.service.engine
    pick = engine._pick
    monkeypatch.setattr(engine, "_pick", lambda logits: time.sleep(0.005) or pick(logits))
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


def test_n_choices_have_seeds_in_a_row(server):
    reply = server.client().chat.completions.create(
        model=server.service.name, messages=SAID, max_tokens=12, n=3, seed=20
    )
    assert [c.message.content for c in reply.choices] == [
        server.text(CHAT_IDS, max_tokens=12, seed=seed) for seed in (20, 21, 22)
    ]
    assert reply.usage.prompt_tokens == len(CHAT_IDS) and reply.usage.completion_tokens == 36
    with server.client().completions.create(
        model=server.service.name, prompt="ab", max_tokens=12, n=2, seed=5, stream=True
    ) as chunks:
        texts = ["", ""]
        for chunk in chunks:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
    assert texts == [server.text([256, 97, 98], max_tokens=12, seed=seed) for seed in (5, 6)]


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


def test_a_full_queue_is_told_to_come_again(serve):
    server = serve(slots=1, queue=1, max_tokens=100_000)
    http, body = server.http(), {"prompt": "a", "max_tokens": 100_000, "stream": True, "logit_bias": {"256": -100}}
    with ExitStack() as open:
        first = open.enter_context(http.stream("POST", TEXT, json=body))
        lines = first.iter_lines()
        next(lines)  # it has its slot
        second = open.enter_context(http.stream("POST", TEXT, json=body))
        assert first.status_code == second.status_code == 200
        refused = http.post(TEXT, json={"prompt": "b"})
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        with pytest.raises(openai.RateLimitError):
            server.client().completions.create(model="retnet", prompt="b")
        refused = http.post(TEXT, json={"prompt": ["b"]})
        assert refused.json()["error"]["code"] == "queue_full"
    assert server.idle()
    assert http.post(TEXT, json={"prompt": "b"}).status_code == 200


def test_some_of_many_prompts_do_not_linger_when_the_rest_is_refused(serve):
    server = serve(slots=1, queue=2)
    body = {"prompt": "a", "max_tokens": 4000, "stream": True, "logit_bias": {"256": -100}}
    http = server.http()
    with http.stream("POST", TEXT, json=body) as first:
        lines = first.iter_lines()
        next(lines)
        with http.stream("POST", TEXT, json=body):  # one waits, so there is room for one more, not two
            assert http.post(TEXT, json={"prompt": ["b", "c"]}).status_code == 429
    assert server.idle()


def test_time_is_bounded(serve):
    server = serve(timeout=0.5, max_tokens=10**6)
    body = {"prompt": "a", "max_tokens": 10**6, "logit_bias": {"256": -100}}
    response = server.http().post(TEXT, json=body)
    assert response.status_code == 504 and response.json()["error"]["code"] == "timeout"
    with (
        pytest.raises(openai.APIError, match=r"more than this server's 0\.5 s"),
        server.client().completions.create(model="retnet", stream=True, **body) as chunks,
    ):
        for _ in chunks:
            continue
    assert server.idle()


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_frees_its_slot(serve, stream, eventually):
    server = serve(slots=1, max_tokens=10**6)
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({**ENDLESS, "stream": stream}).encode()
    with socket.create_connection((host, int(port))) as raw:
        head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert eventually(lambda: server.service.engine.counts["tokens"] > 5)
    assert server.idle()
    assert server.http().post(TEXT, json={"prompt": "b", "max_tokens": 2}).status_code == 200


def test_a_client_that_leaves_the_queue_is_forgotten(serve, eventually):
    server = serve(slots=1, queue=1, max_tokens=10**6)
    http = server.http()
    with http.stream("POST", TEXT, json={**ENDLESS, "stream": True}) as first:
        lines = first.iter_lines()
        next(lines)
        with pytest.raises(httpx.ReadTimeout):
            http.post(TEXT, json={"prompt": "b"}, timeout=0.3)
        assert eventually(lambda: not server.service.engine.queue)
    assert server.idle()


def test_a_client_that_does_not_read_holds_no_slot_and_is_cut_off(serve, eventually):
    server = serve(slots=1, max_tokens=20_000, timeout=3)
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({**ENDLESS, "max_tokens": 600, "stream": True, "logprobs": 20}).encode()
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect((host, int(port)))
        head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert eventually(lambda: server.service.engine.counts["tokens"] > 100)
        # the slot is free again while the answer waits to be read
        other = server.http().post(TEXT, json={"prompt": "b", "max_tokens": 2})
        assert other.status_code == 200 and server.service.in_flight == 1
        assert server.idle()


def test_a_schema_that_is_too_large_is_the_clients_mistake(retnet, caplog):
    """It shows only when the text comes to where all those properties are possible."""
    pytest.importorskip("llguidance", reason="structured output needs pip install 'retentive[structured]'")
    schema = {"type": "object", "properties": {f"property{n}": {"type": "integer"} for n in range(2000)}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"messages": SAID, "response_format": form, "max_tokens": 50, **GREEDY}
    response = retnet.http().post(CHAT, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, "response_format", "schema_refused")
    assert caplog.text == ""


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_long_prompts_are_encoded_in_a_thread(serve, path, monkeypatch):
    server, threads = serve(), []
    encode = ByteTokenizer.encode_batch

    def noting(self, texts):
        threads.append(threading.current_thread())
        return encode(self, texts)

    monkeypatch.setattr(ByteTokenizer, "encode_batch", noting)
    for text in ("a", "a" * 20_001):
        body = {"prompt": text, "messages": [{"role": "user", "content": text}], "max_tokens": 1}
        assert server.http().post(path, json=body).status_code == 200
    short, long = threads
    assert short is not long


def test_what_is_done_in_threads_is_the_same(retnet, monkeypatch):
    body = {"prompt": "The river", "echo": True, "logprobs": 3, "max_tokens": 5, **GREEDY}

    def ask() -> tuple[list, str]:
        whole = retnet.http().post(TEXT, json=body).json()["choices"]
        events = retnet.http().post(TEXT, json={**body, "stream": True}).text
        return whole, "".join(re.findall('"text":"(.*?)"', events))

    want = ask()
    monkeypatch.setattr(completion, "LONG", 0)
    assert ask() == want and want[0][0]["text"] == want[1]


def test_a_session_whose_answer_was_stopped_goes_on_where_the_queue_was_full(serve, monkeypatch):
    """The tokens before the stop could not be read at once: they are read with the next prompt."""
    server = serve()
    whole = server.text(CHAT_IDS, max_tokens=20, **GREEDY)
    body = {"messages": SAID, "max_tokens": 20, "session": "s", **GREEDY}
    submit = server.service.engine.submit

    def full_at_the_end(ids, params=None, **options):
        if params is None:
            raise Full("too many requests are waiting already (1)")
        return submit(ids, params, **options)

    monkeypatch.setattr(server.service.engine, "submit", full_at_the_end)
    first = server.http().post(CHAT, json={**body, "stop": whole[9:11]}).json()["choices"][0]["message"]["content"]
    assert first == whole[: whole.index(whole[9:11])]
    want = server.text([*CHAT_IDS, *f"{first}\nUser: b\nAssistant:".encode()], max_tokens=20, **GREEDY)
    body["messages"] = [{"role": "user", "content": "b"}]
    assert server.http().post(CHAT, json=body).json()["choices"][0]["message"]["content"] == want
