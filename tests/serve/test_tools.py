"""Tools in chats and in /v1/responses, by the official client, with a tiny model that was taught to call them."""

import json

import pytest
import torch

pytest.importorskip("llguidance", reason="tool calls need pip install 'retentive[structured]'")

from retentive.checkpoint import save_model
from retentive.data.tokenizer import ByteTokenizer
from retentive.data.tools import in_words
from retentive.models import build, retnet
from retentive.serve.messages import Tool
from retentive.serve.options import Options
from retentive.serve.service import open_service
from tests.data.test_tools import TAGS, template
from tests.serve.conftest import run

CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 8}}, "required": ["city"]}
WEATHER = {"name": "weather", "parameters": CITY | {"additionalProperties": False}}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": {"name": "clock"}}]
ASKED = [{"role": "user", "content": "Rome?"}]
CALLED = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
TOLD = [*ASKED, {"role": "assistant", "content": "Wait.", "tool_calls": [CALLED]}]
TOLD = [*TOLD, {"role": "tool", "tool_call_id": "a", "content": "rain"}]
FLAT = [{"type": "function", **WEATHER}, {"type": "function", "name": "clock"}]


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A server of a model that calls `weather` when it is asked for Rome, and then says what it was told."""
    shown, tools = template(TAGS), [Tool.model_validate(tool).described() for tool in TOOLS]
    call = CALLED | {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
    told = [*ASKED, TOLD[1] | {"tool_calls": [call]}, TOLD[2], {"role": "assistant", "content": "It rains."}]
    greeted = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    rows = [torch.tensor(shown.first(chat, tools)[: -len("Bot: ")]) for chat in (told, greeted)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, True, 256)
    torch.manual_seed(0)
    model = build(retnet(vocab_size=257, dim=64, layers=2, heads=2))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(150):
        logits, _ = model(ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    folder = tmp_path_factory.mktemp("taught")
    save_model(folder / "taught", model.eval(), ByteTokenizer(), template=shown.source)
    running = run(open_service(folder / "taught", Options(states=folder / "states", slots=4)))
    yield running
    running.stop()


def chat(server, messages=ASKED, tools=TOOLS, **more):
    how = {"model": "taught", "temperature": 0, "max_tokens": 150, **more}
    return server.client().chat.completions.create(messages=messages, tools=tools, **how)


def calls_of(message):
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]


def test_it_calls_a_tool_and_uses_the_answer(taught):
    [choice] = chat(taught).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Wait."
    assert calls_of(choice.message) == [("weather", {"city": "Rome"})]
    [answer] = chat(taught, [*ASKED, choice.message, TOLD[2]]).choices
    assert (answer.message.content, answer.finish_reason, answer.message.tool_calls) == ("It rains.", "stop", None)
    [plain] = chat(taught, [{"role": "user", "content": "Hi"}]).choices
    assert (plain.message.content, plain.finish_reason) == ("Hello.", "stop")


def test_a_stream_gives_the_text_and_then_the_calls(taught):
    with taught.client().chat.completions.stream(model="taught", messages=ASKED, tools=TOOLS, temperature=0) as stream:
        said = "".join(event.delta for event in stream if event.type == "content.delta")
        [choice] = stream.get_final_completion().choices
    assert said == "Wait." and choice.finish_reason == "tool_calls"
    assert calls_of(choice.message) == [("weather", {"city": "Rome"})]


def test_a_session_goes_on_after_a_call(taught):
    more = {"session": "tools"}
    [choice] = chat(taught, extra_body=more).choices
    [answer] = chat(taught, [TOLD[2]], extra_body=more).choices
    assert calls_of(choice.message) and answer.message.content == "It rains."


@pytest.mark.parametrize("name", ["weather", "clock"])
def test_a_call_may_be_asked_for(name, taught):
    choice = {"type": "function", "function": {"name": name}}
    for asked in (choice, "required"):
        [got] = chat(taught, [{"role": "user", "content": "Hi"}], tool_choice=asked, parallel_tool_calls=False).choices
        assert got.finish_reason == "tool_calls" and not got.message.content
        [(called, arguments)] = calls_of(got.message)
        assert called == name or asked == "required"
        assert set(arguments) == ({"city"} if called == "weather" else set())


def test_no_call_without_leave(taught):
    assert chat(taught, tool_choice="none").choices[0].message.tool_calls is None


def test_a_call_that_max_tokens_cuts_off_is_given_as_text(taught):
    [choice] = chat(taught, max_tokens=30).choices
    assert choice.finish_reason == "length" and choice.message.tool_calls is None
    assert choice.message.content.startswith('Wait.\n<call>\n{"name"')


def test_items_of_the_newer_api(taught):
    how = dict(model="taught", tools=FLAT, temperature=0)
    first = taught.client().responses.create(input=ASKED, **how)
    message, call = first.output
    assert message.content[0].text == "Wait." and (call.type, call.name) == ("function_call", "weather")
    assert json.loads(call.arguments) == {"city": "Rome"} and first.tools[0].name == "weather"
    told = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    assert taught.client().responses.create(input=[*ASKED, *first.output, told], **how).output_text == "It rains."
    with taught.client().responses.stream(input=ASKED, **how) as stream:
        kinds = [event.type for event in stream]
        [_, again] = stream.get_final_response().output
    assert json.loads(again.arguments) == {"city": "Rome"}
    assert kinds[-5:] == [
        "response.output_item.added", "response.function_call_arguments.delta",
        "response.function_call_arguments.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip


def test_an_answer_of_calls_alone_has_no_message(taught):
    how = dict(model="taught", tools=FLAT, temperature=0, tool_choice="required", input="Hi")
    assert {item.type for item in taught.client().responses.create(**how).output} == {"function_call"}
    with taught.client().responses.stream(**how) as stream:
        added = [event.item.type for event in stream if event.type == "response.output_item.added"]
    assert set(added) == {"function_call"}


def tool(**function):
    return {"type": "function", "function": function}


@pytest.mark.parametrize(
    ("more", "param", "words"),
    [
        ({"tools": [tool(name="f"), tool(name="f")]}, "tools[1].function.name", "two tools are called 'f'"),
        ({"tools": [tool(name="f g")]}, "tools[0].function.name", "pattern"),
        ({"tools": [tool(name="f", parameters={"type": "wrong"})]}, "tools", "function 'f': the JSON schema cannot"),
        ({"tools": [tool(name="f", parameters={"$ref": "#"})]}, "tools", "function 'f': the JSON schema cannot"),
        ({"tool_choice": tool(name="nobody")}, "tool_choice", "no tool is called 'nobody'; there are weather, clock"),
        ({"tool_choice": "maybe"}, "tool_choice", "expected none, auto, required, or a function by its name"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "or a function by its name"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "tools is empty"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "json_schema is missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "wrong"}}}},
            "tools",
            "the JSON schema cannot be used",
        ),
        ({"functions": [{"name": "f"}]}, "functions", "use tools"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "needs content"),
        ({"messages": [ASKED[0] | {"tool_calls": [CALLED]}]}, "messages[0].tool_calls", "only an assistant"),
        (
            {"messages": [*ASKED, TOLD[1] | {"tool_calls": [CALLED | {"function": {"name": "f", "arguments": "{"}}]}]},
            "messages[1].tool_calls[0].function.arguments",
            "not JSON",
        ),
        ({"tools": [tool(name="f", description="x" * 10**6)]}, "messages", "the prompt has"),
    ],
    ids=lambda x: None if isinstance(x, dict) else x[:30],
)
def test_bad_input(more, param, words, taught):
    body = {"messages": ASKED, "tools": TOOLS, **more}
    reply = taught.http().post("/v1/chat/completions", json=body)
    error = reply.json()["error"]
    assert reply.status_code in (400, 413) and words in error["message"] and "\n" not in error["message"]
    assert error["param"] == param
    assert taught.idle()


@pytest.mark.parametrize("more", [{"tools": None}, {"tool_choice": "none"}])
def test_no_calls_come_if_none_may(more, taught):
    """Earlier calls in the conversation do not change that: what looks like one is text."""
    [choice] = chat(taught, [*TOLD, {"role": "assistant", "content": "It rains."}, *ASKED], **more).choices
    assert choice.finish_reason in ("stop", "length") and choice.message.tool_calls is None


def test_a_call_or_an_answer_that_fits_a_schema(taught):
    """Agents ask for both: an answer is JSON of the schema, or the answer is a call."""
    schema = {"type": "object", "properties": {"wet": {"type": "boolean"}}, "required": ["wet"]}
    form = {"name": "it", "schema": schema | {"additionalProperties": False}}
    seen = set()
    for question in ("Rome?", "Hi", "Yes", "Or"):
        asked = [{"role": "user", "content": question}]
        [choice] = chat(taught, asked, response_format={"type": "json_schema", "json_schema": form}).choices
        if choice.message.tool_calls:
            assert choice.finish_reason == "tool_calls" and not choice.message.content
            assert all(name in ("weather", "clock") for name, _ in calls_of(choice.message))
        else:
            assert choice.message.content in ('{"wet": true}', '{"wet": false}')
        seen.add(choice.finish_reason)
    assert seen <= {"tool_calls", "stop"}


def test_the_stream_helpers_see_whole_calls(taught):
    with taught.client().chat.completions.stream(model="taught", messages=ASKED, tools=TOOLS, temperature=0) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
    assert [(event.name, json.loads(event.arguments)) for event in done] == [("weather", {"city": "Rome"})]


def test_a_call_that_is_asked_for_needs_no_tools_in_the_template(retnet):
    """Clients ask for JSON by a forced call. The functions are then in a system message."""
    for messages in (ASKED, [{"role": "system", "content": "Be brief."}, *ASKED]):
        how = dict(messages=messages, tools=TOOLS, max_tokens=200, temperature=0)
        choice = {"type": "function", "function": {"name": "weather"}}
        reply = retnet.client().chat.completions.create(model="retnet", tool_choice=choice, **how)
        [(name, arguments)] = calls_of(reply.choices[0].message)
        assert name == "weather" and set(arguments) == {"city"}
        assert reply.usage.prompt_tokens > 200  # with both functions, in bytes


def test_a_model_whose_template_shows_no_tools(retnet):
    """Calls and results are text in its prompt, and it may write a call as well as any text."""
    told = [*TOLD, {"role": "user", "content": "And now?"}]
    for messages in (told, [{"role": "system", "content": "Be brief."}, *told]):
        [choice] = (
            retnet.client()
            .chat.completions.create(model="retnet", messages=messages, tools=TOOLS, temperature=0, max_tokens=20)
            .choices
        )
        assert choice.finish_reason == "length" and choice.message.content
    first = retnet.client().responses.create(
        model="retnet", input="Rome?", tools=FLAT, temperature=0, tool_choice="required", parallel_tool_calls=False
    )
    [call] = first.output
    told = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    how = dict(model="retnet", input=[told], previous_response_id=first.id, temperature=0, max_output_tokens=5)
    assert retnet.client().responses.create(**how).output_text


def test_calls_and_results_in_words():
    call = {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
    said = in_words(
        [*ASKED, TOLD[1] | {"tool_calls": [call, call]}, TOLD[2]], [Tool.model_validate(TOOLS[1]).described()]
    )
    assert [m["role"] for m in said] == ["system", "user", "assistant", "user"]
    assert said[0]["content"].startswith('Functions:\n{"name": "clock"') and said[3]["content"] == "Result: rain"
    assert said[2]["content"].split("\n") == ["Wait.", *['{"name": "weather", "arguments": {"city": "Rome"}}'] * 2]
