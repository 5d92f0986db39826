"""Tool calls in the notation of a chat template, which is found by rendering examples.

    notation = template.notation
    notation.text([Call("weather", '{"city": "Rome"}')])      <tool_call>\\n{"name": "weather", "arguments": {…}}\\n…
    notation.split(answer)                                    the text of an answer, and its calls

Each family of models has a notation of its own, and its template is the only place that states it.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

TEXT, NAMES, KEY = "\ue003", ("example_one", "example_two"), "example_key"
"""Content, function names and argument of the examples."""
TOOL = {
    "type": "function",
    "function": {"name": "example_tool", "description": "", "parameters": {"type": "object", "properties": {}}},
}

NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
"""Schema of the arguments of a function without parameters: an empty object."""

Render = Callable[..., str]
"""Renders messages: `(messages, ask=…, tools=…)`."""


class Call(NamedTuple):
    """Call of a function."""

    name: str
    arguments: str
    """An object in JSON."""


@dataclass(frozen=True)
class Notation:
    """Text around the names and arguments of the calls in an answer."""

    lead: str
    """White space before the first call of an answer without text."""
    gap: str
    """White space between the answer's text and the first call."""
    begin: str
    """Text before the name of the first call."""
    middle: str
    """Text between a name and its arguments."""
    between: str | None
    """Text between the arguments of a call and the name of the next; None if an answer holds one call at most."""
    end: str
    """Text after the arguments of the last call."""

    def answer(self, text: str, calls: Sequence[Call]) -> str:
        """Returns an answer of a text, which may be empty, and calls; raises ValueError for more than it can have."""
        if len(calls) > 1 and self.between is None:
            raise ValueError(f"the chat template shows one tool call in an answer, got {len(calls)}")
        called = (self.between or "").join(f"{call.name}{self.middle}{call.arguments}" for call in calls)
        return f"{text}{self.gap if text else self.lead}{self.begin}{called}{self.end}" if calls else text

    def certain(self, text: str) -> int:
        """Returns how many first characters of a growing answer belong to no call, whatever follows."""
        at = text.find(self.begin)
        if at < 0:
            longest = max((n for n in range(1, len(self.begin)) if text.endswith(self.begin[:n])), default=0)
            at = len(text) - longest
        return len(text[:at].rstrip())

    def split(self, answer: str) -> tuple[str, list[Call]]:
        """Returns the text of an answer, and its calls.

        Raises:
            ValueError: a call is cut off or not in this notation.
        """
        at, calls = answer.find(self.begin), list[Call]()
        if at < 0:
            return answer, calls
        position = at + len(self.begin)
        while True:
            name_end = answer.find(self.middle, position)
            if name_end < 0:
                raise ValueError(f"tool call {len(calls) + 1} is cut off in its name")
            start = name_end + len(self.middle)
            try:
                value, stop = json.JSONDecoder().raw_decode(answer, start)
            except ValueError:
                value, stop = None, start
            if not isinstance(value, dict):
                raise ValueError(f"the arguments of tool call {len(calls) + 1} are no JSON object, or are cut off")
            calls.append(Call(answer[position:name_end], answer[start:stop]))
            if self.between is not None and answer.startswith(self.between, stop):
                position = stop + len(self.between)
                continue
            if answer[stop:].rstrip() != self.end.rstrip():
                raise ValueError(f"tool call {len(calls)} does not end with {self.end.strip()!r}")
            return answer[:at].rstrip(), calls


PLAIN = Notation("", "\n", '{"name": "', '", "arguments": ', None, "}")
"""Notation for a model whose template shows no tools."""


def in_words(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns messages for a template that shows no tools: these are in a system message, calls and results are text.

    Args:
        messages: with `tool_calls`, and of the role "tool".
    """
    said = list[Mapping[str, Any]]()
    for message in messages:
        if message["role"] == "tool":
            said.append({"role": "user", "content": f"Result: {message['content']}"})
            continue
        functions = [call["function"] for call in message.get("tool_calls", ())]
        calls = [Call(each["name"], json.dumps(each["arguments"], ensure_ascii=False)) for each in functions]
        text = "\n".join([*filter(None, [message["content"]]), *(PLAIN.answer("", [call]) for call in calls)])
        said.append({"role": message["role"], "content": text} if calls else message)
    if not tools:
        return said
    told = "\n".join(["Functions:", *(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)])
    if said and said[0]["role"] == "system" and isinstance(said[0]["content"], str):
        return [{**said[0], "content": f"{said[0]['content']}\n\n{told}"}, *said[1:]]
    return [{"role": "system", "content": told}, *said]


def find_notation(render: Render, special: re.Pattern[str]) -> Notation:
    """Returns the notation of a template.

    Args:
        render: renders messages by the template.
        special: pattern of the special tokens' names.

    Raises:
        ValueError: the template shows no tools, or writes calls in a form that is not served.
    """
    question = [{"role": "user", "content": "."}]
    if TOOL["function"]["name"] not in render(question, tools=[TOOL]):  # type: ignore[index]
        raise ValueError("the chat template shows no tools")
    gap, (begin, middle), after = _shown(render, question, NAMES[:1])
    lead, _, _ = _shown(render, question, NAMES[:1], text="")
    end = special.search(after)
    if end is None:
        raise ValueError("the chat template ends tool calls with no special token")
    try:
        _, (_, _, between, _), _ = _shown(render, question, NAMES)
    except ValueError:  # the template refuses more than one call, or shows the first alone
        between = None
    if special.search(begin + middle + (between or "")):
        raise ValueError("the chat template writes tool calls with special tokens, which is not served")
    return Notation(lead, gap, begin, middle, between, after[: end.start()])


def _shown(render: Render, question: list[Any], names: Sequence[str], text: str = TEXT) -> tuple[str, list[str], str]:
    """Returns (white space before the calls, texts before each name and each arguments, text after the last).

    Args:
        text: content of the answer that calls.
    """
    calls = [
        {"id": f"example0{n}", "type": "function", "function": {"name": name, "arguments": {KEY: 1}}}
        for n, name in enumerate(names)
    ]
    answer = {"role": "assistant", "content": text, "tool_calls": calls}
    shown = render([*question, answer], ask=False, tools=[TOOL])
    if TEXT not in shown:  # none is given, or the template shows the calls of an answer, or its text, but not both
        asked = render(question, tools=[TOOL])
        shown = render([*question, {**answer, "content": ""}], ask=False, tools=[TOOL])
        if not shown.startswith(asked):
            raise ValueError("the chat template asks for an answer otherwise than it shows a tool call")
        shown = TEXT + shown[len(asked) :]
    rest, parts = shown.split(TEXT)[-1], list[str]()
    for name in names:
        at = rest.find(name)
        start = rest.rfind("{", 0, max(rest.find(f'"{KEY}"', at), 0))
        try:
            value, stop = json.JSONDecoder().raw_decode(rest, start)
        except (ValueError, IndexError):
            value, stop = None, 0
        if at < 0 or start < at or value != {KEY: 1}:
            raise ValueError("the chat template shows no name and JSON arguments of a tool call")
        parts += [rest[:at], rest[at + len(name) : start]]
        rest = rest[stop:]
    begin = parts[0].lstrip()
    if not begin or not parts[1]:
        raise ValueError("the chat template marks no beginning of a tool call")
    return parts[0][: len(parts[0]) - len(begin)], [begin, *parts[1:]], rest


def described(function: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a function as chat templates are given it, with the same fields in training and in serving.

    Args:
        function: OpenAI's description: `name`, and perhaps `description` and `parameters`, a JSON schema.
    """
    parameters = function.get("parameters") or NO_PARAMETERS
    known = {"name": function["name"], "description": function.get("description") or "", "parameters": parameters}
    return {"type": "function", "function": known}


def check_arguments(text: str) -> dict[str, Any]:
    """Returns the arguments of a call as an object; raises ValueError if the text is no JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"the arguments are not JSON ({error})") from None
    if not isinstance(value, Mapping):
        raise ValueError("the arguments must be a JSON object")
    return dict(value)
