"""The form of what clients get, where the official client does not look."""

import json

import pytest

from retentive.data.tokenizer import ByteTokenizer
from retentive.serve.choices import Delta, TokenLogprob
from retentive.serve.responses import ChatResponses, CompletionResponses
from tests.serve.asked import CHAT, GREEDY, SAID, TEXT


def test_a_streamed_completion_ends_as_openai_does(server):
    body = {"prompt": "Once", "max_tokens": 9, "stream": True, **GREEDY}
    with server.http().stream("POST", "/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: {") for line in lines[:-1]) and lines[-1] == "data: [DONE]"


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_where_usage_was_asked_for_every_chunk_has_the_field(retnet, path):
    body = {"prompt": "Once", "messages": SAID, "max_tokens": 9, "stream": True, **GREEDY}
    for asked in (True, False):
        response = retnet.http().post(path, json={**body, "stream_options": {"include_usage": asked}})
        chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        if not asked:
            assert all("usage" not in chunk for chunk in chunks)
            continue
        *chunks, last = chunks
        assert len(chunks) > 0 and all(chunk["usage"] is None for chunk in chunks)
        assert last["usage"]["completion_tokens"] == 9 and last["choices"] == []


def test_what_json_has_no_word_for():
    """Minus infinity is a very unlikely token; of part of a character the bytes are not known."""
    token = TokenLogprob(0xC3, float("-inf"), ((0xC3, float("-inf")), (65, -0.5)), 0)
    delta = Delta(0, "\ufffd", [token], "stop")
    text = json.loads(CompletionResponses("m", ByteTokenizer(), logprobs=True).whole([[delta]]))["choices"][0]
    assert text["logprobs"]["token_logprobs"] == [-9999.0] and text["logprobs"]["top_logprobs"][0]["A"] == -0.5
    chat = json.loads(ChatResponses("m", ByteTokenizer(), logprobs=True).whole([[delta]]))["choices"][0]
    [entry] = chat["logprobs"]["content"]
    assert entry["bytes"] is None and entry["top_logprobs"][1] == {"token": "A", "logprob": -0.5, "bytes": [65]}


def test_deltas_join_to_the_whole():
    parts = [Delta(0, "Hel", [], None), Delta(0, "lo", [], None), Delta(0, "", [], "length")]
    responses = ChatResponses("m", ByteTokenizer(), logprobs=False)
    whole = json.loads(responses.whole([parts]))["choices"][0]
    assert whole["message"]["content"] == "Hello" and whole["finish_reason"] == "length"
    events = responses.chunks(parts).decode().split("\n\n")[:-1]
    chunks = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    assert [chunk["delta"] for chunk in chunks] == [{"content": "Hel"}, {"content": "lo"}, {}]
