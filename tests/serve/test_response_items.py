"""`/v1/responses` by the official client: the text of a chat with the same messages."""

import openai
import pytest

from retentive.serve.errors import Refused
from retentive.serve.items import InputTextPart, Kept, MessageItem
from tests.serve.asked import CHAT_IDS, DRAWN, GREEDY, SAID

ASKED = [{"role": m["role"], "content": m["content"]} for m in SAID]


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_text_is_that_of_the_chat(server, params):
    known = {name: params[name] for name in params if name in ("temperature", "top_p")}
    more = {"seed": params["seed"]} if "seed" in params else {}
    want = server.text(CHAT_IDS, max_tokens=40, **params)
    reply = server.client().responses.create(
        model=server.service.name, input=ASKED, max_output_tokens=40, **known, extra_body=more
    )
    assert reply.output_text == want and reply.object == "response"
    assert (reply.usage.input_tokens, reply.usage.output_tokens, reply.usage.total_tokens) == (31, 40, 71)
    assert reply.status == "incomplete" and reply.incomplete_details.reason == "max_output_tokens"
    assert reply.output[0].role == "assistant" and reply.output[0].status == "incomplete"


def test_a_stream_has_the_clients_events(server):
    want = server.text(CHAT_IDS, max_tokens=30, **GREEDY)
    with server.client().responses.create(
        model=server.service.name, input=ASKED, max_output_tokens=30, temperature=0, stream=True
    ) as events:
        events = list(events)
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == want
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.output_text == want and events[-1].response.usage.output_tokens == 30
    assert len({e.item_id for e in events if hasattr(e, "item_id")}) == 1


def test_the_clients_own_stream_helper(server):
    want = server.text(CHAT_IDS, max_tokens=10, **GREEDY)
    how = dict(model=server.service.name, input=ASKED, max_output_tokens=10, temperature=0)
    with server.client().responses.stream(**how) as stream:
        assert "".join(e.delta for e in stream if e.type == "response.output_text.delta") == want


def test_instructions_are_the_system_message(server):
    how = dict(model=server.service.name, temperature=0, max_output_tokens=12)
    said = server.client().chat.completions.create(
        model=server.service.name, temperature=0, max_tokens=12,
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}],
    )  # fmt: skip
    parts = [{"role": "user", "content": [{"type": "input_text", "text": "Who?"}]}]
    for asked in ("Who?", parts):
        reply = server.client().responses.create(instructions="Be brief.", input=asked, **how)
        assert reply.output_text == said.choices[0].message.content


def test_a_session_goes_on(server):
    client, how = server.client(), dict(model=server.service.name, temperature=0, max_output_tokens=8)
    client.responses.create(input="Who?", **how, extra_body={"session": "responses"})
    again = client.responses.create(input="And then?", **how, extra_body={"session": "responses"})
    assert again.session["tokens"] > again.usage.input_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_a_later_request_refers_to_a_response(stream, server):
    """By the id of the response, or of its items: the prompt is that of the whole conversation sent again."""
    client, how = server.client(), dict(model=server.service.name, temperature=0, max_output_tokens=8)
    if stream:
        with client.responses.create(input="Who?", stream=True, **how) as events:
            first = list(events)[-1].response
    else:
        first = client.responses.create(input="Who?", **how)
    asked, then = {"role": "user", "content": "Who?"}, {"role": "user", "content": "And then?"}
    want = client.responses.create(input=[asked, *first.output, then], **how)
    referred = [
        asked,
        {"type": "reasoning", "id": "r", "summary": []},
        {"type": "item_reference", "id": first.output[0].id},
    ]
    for reply in (
        client.responses.create(input=[then], previous_response_id=first.id, **how),
        client.responses.create(input=[*referred, then], **how),
    ):
        assert reply.output_text == want.output_text and reply.usage.input_tokens == want.usage.input_tokens
    third = client.responses.create(input="More", previous_response_id=reply.id, **how)
    assert third.usage.input_tokens > reply.usage.input_tokens
    unkept = client.responses.create(input="Who?", store=False, **how)
    with pytest.raises(openai.NotFoundError, match="is not here"):
        client.responses.create(input="And then?", previous_response_id=unkept.id, **how)


def test_items_are_kept_within_a_size():
    kept = Kept(most=200)
    item = MessageItem(role="user", content=[InputTextPart(type="input_text", text="a" * 50)])
    kept.keep("owner", "first", [item])
    kept.keep("owner", "second", [item])
    assert kept.of("owner", "second", "id") == [item] and kept.size <= 200
    for owner, id in (("owner", "first"), ("other", "second")):
        with pytest.raises(Refused, match="is not here"):
            kept.of(owner, id, "id")


def test_an_answer_that_fits_a_schema(server):
    pytest.importorskip("llguidance", reason="structured output needs pip install 'retentive[structured]'")
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    form = {"type": "json_schema", "name": "it", "schema": schema | {"additionalProperties": False}}
    reply = server.client().responses.create(
        model=server.service.name, input="Who?", max_output_tokens=60, temperature=0, text={"format": form}
    )
    assert reply.output_text in ('{"a": true}', '{"a": false}') and reply.status == "completed"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"input": []}, "input"),
        ({"input": "a", "previous_response_id": "resp-1"}, "'resp-1' is not here: send its items again"),
        ({"input": [{"type": "item_reference", "id": "msg-1"}]}, "'msg-1' is not here: send its items again"),
        ({"input": "a", "previous_response_id": "resp-1", "session": "s"}, "a session remembers itself"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools[0].type: Input should be 'function'"),
        ({"input": [{"type": "film"}]}, "expected an item of type message, function_call, function_call_output"),
        ({"input": "a", "max_output_tokens": 10**9}, "at most"),
        ({"input": "a", "temperature": 9}, "temperature"),
        ({"input": [{"role": "robot", "content": "a"}]}, "input[0].role: Input should be 'system'"),
        ({"input": "a", "model": "other"}, "the model 'other' is not here"),
    ],
    ids=str,
)
def test_bad_input(body, words, server):
    reply = server.http().post("/v1/responses", json=body)
    assert reply.status_code in (400, 404) and words in reply.json()["error"]["message"]
    assert server.idle()


def test_a_stream_that_fails_ends_with_an_error(server, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("broken")

    monkeypatch.setattr(server.service.engine, "_pick", broken)
    with server.client().responses.create(model=server.service.name, input="a", stream=True) as events:
        last = list(events)[-1]
    assert last.type == "error" and last.message == "the model failed on this request: broken"
    assert last.code == "model_failed"
