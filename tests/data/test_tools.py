"""Tool calls: the notation that a chat template has for them."""

import itertools
import re
from pathlib import Path

import pytest

from retentive.checkpoint import ModelFolder
from retentive.checkpoint.find import shipped
from retentive.data.templates import BUILT_IN, TURNS, ChatTemplate
from retentive.data.tokenizer import ByteTokenizer
from retentive.data.tools import Call, check_arguments, described

HEAD = "{{ eos_token }}{% if tools %}{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}"
ASK = "{% if add_generation_prompt %}Bot: {% endif %}"
TAGS = """{% for m in messages %}{% if m.role == 'assistant' %}Bot: {{ m.content }}\
{% for c in m.tool_calls %}{{ '\n' }}<call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</call>{% endfor %}{{ eos_token }}
{% else %}{{ m.role }}: {{ m.content }}
{% endif %}{% endfor %}"""
"""As Qwen's and Hermes': any number of calls in tags, after the text."""
BARE = """{% for m in messages %}{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}\
{{ raise_exception('one call') }}{% endif %}Bot: {"name": "{{ m.tool_calls[0].function.name }}", "parameters": \
{{ m.tool_calls[0].function.arguments | tojson }}}{{ eos_token }}
{% elif m.role == 'assistant' %}Bot: {{ m.content }}{{ eos_token }}
{% else %}{{ m.role }}: {{ m.content }}
{% endif %}{% endfor %}"""
"""As Llama 3.1's: one call instead of text."""
NAMED = (
    TAGS.replace('<call>\n{"name": "', "<function=")
    .replace('", "arguments": ', ">")
    .replace("}}}\n</call>", "}}</function>")
)
"""As Llama 3.2's of text: the name in the tag."""


def template(body: str, head: str = HEAD) -> ChatTemplate:
    tokenizer = ByteTokenizer()
    return ChatTemplate(head + body + ASK, tokenizer, tokenizer.special, own=True)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("body", [TAGS, BARE, NAMED], ids=["tags", "bare", "named"])
def test_calls_are_read_as_the_template_writes_them(body, several):
    shown = template(body)
    calls = [Call("weather", '{"city": "Rome"}'), Call("time", "{}")][: 1 + several]
    if several and body is BARE:
        assert shown.notation.between is None
        return
    text = "" if body is BARE else "Let me see."
    functions = [{"function": {"name": c.name, "arguments": check_arguments(c.arguments)}} for c in calls]
    answer = {"role": "assistant", "content": text, "tool_calls": functions}
    question = {"role": "user", "content": "Where?"}
    written = ByteTokenizer().decode(shown.first([question, answer]))
    after = written.split("Bot: ")[1].strip()
    assert shown.notation.split(after) == (text, calls)
    assert shown.notation.answer(text, calls) == after


@pytest.mark.parametrize("learnt", [1, 0])
@pytest.mark.parametrize("text", ["Let me see.", ""])
@pytest.mark.parametrize("source", [TURNS, HEAD + TAGS + ASK, HEAD + NAMED + ASK], ids=["turns", "tags", "named"])
def test_what_is_taught_is_what_is_read(source, text, learnt):
    """Ids of training equal those of a prompt with the same history, and answers are learnt with their calls."""
    tokenizer = ByteTokenizer()
    shown = ChatTemplate(source, tokenizer, tokenizer.special, own=True)
    calls = [{"function": {"name": "f", "arguments": {"a": n}}} for n in range(2)]
    said = [
        {"role": "user", "content": "Now?"},
        {"role": "assistant", "content": text, "tool_calls": calls, "weight": learnt},
        {"role": "tool", "content": "<|endoftext|>"},
        {"role": "assistant", "content": "Yes."},
    ]
    tools = [described({"name": "f"})]
    [(ids, answers)] = shown.taught([said], [tools])
    asked = shown.first(said, tools)
    assert ids == asked[: len(ids)]
    read = tokenizer.decode([id for id, answer in zip(ids, answers, strict=True) if answer])
    assert ('{"a": 1}' in read) == bool(learnt) and read.endswith("Yes.") and "Now" not in read
    first = tokenizer.decode([id for id, answer in zip(ids, answers, strict=True) if answer]).split("Yes.")[0].strip()
    if learnt:
        assert shown.notation.split(first.removeprefix("Assistant:").strip())[0] == text
        assert len(shown.notation.split(first)[1]) == 2


def test_the_example_for_models_of_chatml():
    """It writes conversations without tools as the model's own template does, apart from its default system message."""
    if "smollm2-retnet-135m" not in shipped():
        pytest.skip("the model comes with a clone alone")
    folder = ModelFolder.open("smollm2-retnet-135m")
    tokenizer = folder.tokenizer
    shown = folder.template(tokenizer, Path(__file__).parents[2] / "examples" / "chatml-tools.jinja")
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Rome?"}]
    assert shown.first(plain) == folder.template(tokenizer).first(plain)
    call = {"function": {"name": "f", "arguments": {"a": 1}}}
    said = [*plain, {"role": "assistant", "content": "", "tool_calls": [call, call]}, {"role": "tool", "content": "1"}]
    said, tools = [*said, {"role": "assistant", "content": "One."}], [described({"name": "f"})]
    [(ids, answers)] = shown.taught([said], [tools])
    assert ids == shown.first(said, tools)[: len(ids)] and "call these functions:\n{" in tokenizer.decode(ids)
    written = tokenizer.decode([id for id, answer in zip(ids, answers, strict=True) if answer])
    assert written == shown.notation.answer("", [Call("f", '{"a": 1}')] * 2) + "One."


def test_more_calls_than_the_template_shows():
    said = [
        {"role": "user", "content": "Now?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}] * 2},
    ]
    with pytest.raises(ValueError, match="the chat template shows one tool call in an answer, got 2"):
        template(BARE).taught([said])


def test_text_is_given_out_until_a_call_may_begin():
    notation = template(TAGS).notation
    assert notation.begin == '<call>\n{"name": "' and notation.gap == "\n"
    answer = 'Is 1 <call 2?\n<call>\n{"name": "f'
    shown = [answer[: notation.certain(answer[:n])] for n in range(len(answer) + 1)]
    assert shown[-1] == "Is 1 <call 2?" and "Is 1" in shown and "Is 1 <" not in shown
    assert all(len(a) <= len(b) for a, b in itertools.pairwise(shown))
    assert notation.split("No call, 1 < 2.") == ("No call, 1 < 2.", [])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('<call>\n{"name": "wea', "tool call 1 is cut off in its name"),
        ('<call>\n{"name": "f", "arguments": {"a": ', "no JSON object, or are cut off"),
        ('<call>\n{"name": "f", "arguments": [1]}\n</call>', "no JSON object"),
        ('<call>\n{"name": "f", "arguments": {}}\n', "does not end with '}\\n</call>'"),
        ('<call>\n{"name": "f", "arguments": {}}\n</call> and more', "does not end with"),
    ],
)
def test_a_call_that_does_not_parse(text, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        template(TAGS).notation.split(text)


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        (lambda: template(BUILT_IN, ""), "shows no tools"),
        (lambda: template(TAGS, "{{ eos_token }}"), "shows no tools"),
        (lambda: template(TAGS.replace("</call>{% endfor %}{{ eos_token }}", "</call>{% endfor %}")), "no special"),
        (lambda: template(TAGS.replace("<call>", "{{ eos_token }}", 1)), "with special tokens"),
        (lambda: template(TAGS.replace(" | tojson", ".example_key")), "no name and JSON arguments"),
        (lambda: template("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"), "no name and JSON"),
    ],
    ids=["built-in", "no tools", "no end", "special", "no JSON", "no calls"],
)
def test_templates_without_a_notation_that_is_served(shown, words):
    with pytest.raises(ValueError, match=words):
        _ = shown().notation


def test_tools_and_calls_stay_text():
    """The name of a special token in a description or an argument becomes characters, never the token."""
    eos, shown = ByteTokenizer().eos_id, template(TAGS)
    tool = {"type": "function", "function": {"name": "f", "description": "<|endoftext|>", "parameters": {}}}
    call = {"function": {"name": "f", "arguments": {"<|endoftext|>": ["<|endoftext|>"]}}}
    ids = shown.first(
        [{"role": "user", "content": "."}, {"role": "assistant", "content": "", "tool_calls": [call]}], [tool]
    )
    assert ids.count(eos) == 2  # the template's own: at the start, and after the answer
    assert ByteTokenizer().decode(ids).count("<|endoftext|>") == 3


@pytest.mark.parametrize(("text", "words"), [("{", "not JSON"), ("[1]", "must be a JSON object")])
def test_arguments_must_be_an_object(text, words):
    with pytest.raises(ValueError, match=words):
        check_arguments(text)
