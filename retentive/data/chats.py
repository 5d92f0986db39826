"""Conversations from files: the usual schemas in, checked messages out. Errors name file and line.

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}, …]}
    {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}, …]}     ShareGPT's
    {"prompt": "…", "completion": "…"}                           a question and its answer; either may be messages too
    {"instruction": "…", "input": "…", "output": "…"}            Alpaca's; the input, which may lack, ends the question

Messages of the first schema may call tools, as in OpenAI's files: an assistant's has `tool_calls`, messages of the role
"tool" answer, and `tools` beside the messages describes the functions. An answer with `"weight": 0` is not learnt.

Each is one line of .jsonl, an entry of a list in .json, or a row of .parquet. Other fields are ignored. A content may
be a list of parts: {"type": "text", "text": …}, {"type": "image", "image": FILE}, {"type": "audio", …}, where FILE may
also be a member of an archive or a row of an array (`archives`). A conversation may begin with a system message, then
user and assistant alternate. A last message without an answer is dropped, since it teaches nothing.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from retentive.data.formats import OnBadText, TextCheck, kind_of, objects
from retentive.data.media import KINDS as KINDS_OF_MEDIA
from retentive.data.media import Media, Open, media_of, text_of
from retentive.data.sources import Say, find_files
from retentive.data.templates import Message, Tool
from retentive.data.tools import check_arguments, described
from retentive.tables import counted

KINDS = (".jsonl", ".json", ".parquet")
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
}
"""Names of the speakers in schemas, and the roles of templates."""
SCHEMAS = "messages, conversations, prompt and completion, or instruction and output"
BESIDE = {"image": "image", "images": "image", "audio": "audio", "audios": "audio"}
"""Fields in which other projects name media files, outside the conversation. Ignoring them would train blind."""


class Conversation(NamedTuple):
    """Messages in turns, and their name."""

    name: str
    """Origin relative to the source: FILE:LINE."""
    messages: list[Message]
    """An optional system message, then user and assistant in turns, ending with an assistant's message. A message that
    calls tools is followed by their answers."""
    tools: Sequence[Tool] = ()
    """Functions that may be called, as in OpenAI's API."""

    @property
    def text(self) -> str:
        """The messages' text, one message or call per line."""
        lines = []
        for message in self.messages:
            lines.append(text_of(message["content"]))
            functions = [call["function"] for call in message.get("tool_calls", ())]
            lines += [f"{each['name']} {json.dumps(each['arguments'], ensure_ascii=False)}" for each in functions]
        return "\n".join(lines)


def chat_files(source: str | Path) -> dict[str, Path]:
    """Returns name -> path of the conversation files in a folder, or of the one file.

    Raises:
        OSError: the file or folder does not exist or cannot be read.
        ValueError: it has no file of conversations.
    """
    if str(source).startswith("hf:"):
        raise ValueError(f"conversations are read from files, not from the hub: download {source}")
    if (Path(source) / "meta.json").is_file():
        raise ValueError(f"{source} is packed already: give its conversations, or that folder alone to retentive sft")
    try:
        found = find_files(source, ("json",), advise=False).files
    except ValueError:
        found = {}
    files = {name: path for name, path in found.items() if kind_of(path)[0] in KINDS}
    if not files:
        raise ValueError(f"no conversations in {source}: expected files that end in {' '.join(KINDS)}")
    return files


def chats(
    source: str | Path,
    *,
    media: Open | None = None,
    on_bad_text: OnBadText = "refuse",
    advise: bool = True,
    say: Say = warnings.warn,
) -> Iterator[Conversation]:
    """Yields the conversations of a file, or of all files of a folder, one at a time.

    Args:
        media: opens the files named in parts of messages, relative to the folder of their own file; None refuses them.
        on_bad_text: "refuse" or "skip" entries that are no conversation, are not UTF-8, or name unreadable files.
        advise: add options of `retentive data` to error messages.
        say: called with a line about skipped entries.

    Raises:
        OSError, ValueError: as `chat_files`, by the call. The iterator raises for a damaged file and, unless skipped,
            for an entry that is no conversation.
    """
    check, files = TextCheck(on_bad_text, advise=advise), chat_files(source)

    def found() -> Iterator[Conversation]:
        empty, first = True, ""
        for name, path in files.items():
            for within, value in objects(path, check):
                try:
                    messages = messages_of(value, None if media is None else partial(media, folder=path.parent))
                    tools = tools_of(value)
                except (ValueError, OSError) as error:
                    check.bad(f"{path}{within}", f"cannot be taken: {error}", "fix it")
                    first = first or f"{path}{within}: {error}"
                    continue
                empty = False
                yield Conversation(name + within, messages, tools)
        if check.skipped:
            skipped = counted(len(check.skipped), "conversation")
            say(f"{source}: skipped {skipped}, the first is {first or check.skipped[0]}")
        if empty:
            raise ValueError(f"no conversations in {source}: it is empty{' or all were skipped' * bool(check.skipped)}")

    return found()


def messages_of(value: Any, media: Callable[[str, str], Media] | None = None) -> list[Message]:
    """Returns the messages of an object in one of the schemas, in turns, with surrounding space stripped.

    Args:
        media: (kind, file name in a part) -> the opened medium; None refuses such parts.

    Raises:
        OSError: a part names a missing file.
        ValueError: an unknown schema or role, roles out of order, an empty message, or no answer.
    """
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {_kind(value)}")
    if value.get("messages") is not None:
        said = _listed("messages", value["messages"], "role", "content")
    elif value.get("conversations") is not None:
        said = _listed("conversations", value["conversations"], "from", "value")
    elif value.get("prompt") is not None and value.get("completion") is not None:
        said = [*_side(value, "prompt", "user"), *_side(value, "completion", "assistant")]
    elif value.get("instruction") is not None and value.get("output") is not None:
        said = [("user", _alpaca(value), {}), ("assistant", value["output"], {})]
    else:
        got = ", ".join(f"{name} (null)" if x is None else str(name) for name, x in value.items())
        raise ValueError(f"expected {SCHEMAS}, got {got or 'no field'}")
    messages: list[Message] = [
        {**_message(number, role, content, media, called := _calls(number, entry)), **called}
        for number, (role, content, entry) in enumerate(said, 1)
    ]
    if media is not None and not media_of(messages) and (beside := [name for name in BESIDE if value.get(name)]):
        kind = BESIDE[beside[0]]
        part = f'{{"type": "{kind}", "{kind}": FILE}}'
        raise ValueError(f"{beside[0]!r} stands beside what is said: put {part} into the content of the message")
    _check_turns(messages)
    while messages[-1]["role"] != "assistant":
        messages.pop()
    return messages


def tools_of(value: dict[str, Any]) -> list[Tool]:
    """Returns the functions in `tools` of an object; raises ValueError if they are not described as OpenAI's."""
    tools = value.get("tools") or []
    if isinstance(tools, str):  # some files hold them as JSON in a string
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"tools are not JSON ({error})") from None
    if not isinstance(tools, list):
        raise ValueError(f"tools must be a list, got {_kind(tools)}")
    for number, tool in enumerate(tools, 1):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f'tool {number}: expected {{"type": "function", "function": {{"name": …, …}}}}')
    return [described(tool["function"]) for tool in tools]


def _calls(number: int, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a message of OpenAI's schema holds beside its content: calls, the call it answers, its weight."""
    found: dict[str, Any] = {}
    if entry.get("role") == "tool":
        found = {"tool_call_id": entry.get("tool_call_id"), **({"name": entry["name"]} if entry.get("name") else {})}
    if entry.get("weight") is not None:
        if entry["weight"] not in (0, 1):
            raise ValueError(f"message {number}: its weight must be 0 or 1, got {entry['weight']!r}")
        found["weight"] = entry["weight"]
    calls = entry.get("tool_calls")
    if not calls:
        return found
    if entry.get("role") != "assistant" or not isinstance(calls, list):
        raise ValueError(f"message {number}: tool_calls must be a list in an assistant's message")
    made = []
    for nth, call in enumerate(calls, 1):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"message {number}: tool call {nth} names no function")
        arguments = function.get("arguments", {})
        try:
            arguments = check_arguments(arguments if isinstance(arguments, str) else json.dumps(arguments))
        except ValueError as error:
            raise ValueError(f"message {number}, tool call {nth}: {error}") from None
        made.append({"id": call.get("id"), "type": "function", "function": {**function, "arguments": arguments}})
    return {**found, "tool_calls": made}


def _alpaca(value: dict[str, Any]) -> Any:
    """Returns the question of an object in Alpaca's schema: the instruction, and the input below it if there is one."""
    asked, given = value["instruction"], value.get("input")
    if given in (None, "") or not isinstance(asked, str):  # what is no text is refused with the message
        return asked
    if not isinstance(given, str):
        raise ValueError(f"input must be text, got {_kind(given)}")
    return f"{asked}\n\n{given}" if given.strip() else asked


Said = tuple[Any, Any, Mapping[str, Any]]
"""Role, content, and the entry that holds both in a schema of messages."""


def _listed(name: str, value: Any, role: str, content: str) -> list[Said]:
    """Returns what each entry of a list under `name` says; one that calls tools needs no content."""
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise ValueError(f"{name} must be a list of objects")
    for number, entry in enumerate(value, 1):
        needed = (role,) if entry.get("tool_calls") else (role, content)
        if missing := [field for field in needed if field not in entry]:
            raise ValueError(f"{name}, entry {number}: has no {missing[0]!r}")
    return [
        (entry[role], "" if entry.get(content) is None and entry.get("tool_calls") else entry[content], entry)
        for entry in value
    ]


def _side(value: dict[str, Any], name: str, role: str) -> list[Said]:
    return _listed(name, value[name], "role", "content") if isinstance(value[name], list) else [(role, value[name], {})]


def _message(
    number: int, role: Any, content: Any, media: Callable[[str, str], Media] | None, called: Mapping[str, Any]
) -> Message:
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"message {number} is by {role!r}, expected one of {', '.join(ROLES)}")
    if not isinstance(content, str | list):
        raise ValueError(f"message {number}: its content must be text or a list of parts, got {_kind(content)}")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]  # parts as in OpenAI's API
    found = [_part(number, part, media) for part in parts]
    try:
        "".join(part for part in found if isinstance(part, str)).encode()
    except UnicodeEncodeError:
        raise ValueError(f"message {number}, by {role}, holds half of a surrogate pair") from None
    if not any(isinstance(part, Media) for part in found):
        found = ["".join(map(str, found)).strip()]
    elif ROLES[role] == "assistant":
        raise ValueError(f"message {number}, by {role}, holds more than text, and models here write text alone")
    if not any(found) and not called.get("tool_calls"):
        raise ValueError(f"message {number}, by {role}, is empty")
    return {"role": ROLES[role], "content": found[0] if isinstance(found[0], str) and len(found) == 1 else found}


def _part(number: int, part: Any, media: Callable[[str, str], Media] | None) -> str | Media:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind in KINDS_OF_MEDIA and isinstance(part.get(kind), str) and part[kind]:
        if media is None:
            raise ValueError(f"message {number} holds {kind}: say how it becomes tokens (`{kind}`)")
        return media(kind, part[kind])
    if kind in ("text", *KINDS_OF_MEDIA):
        named = f"a part of type {kind!r} must name its {'text' if kind == 'text' else 'file'} as {kind!r}"
        raise ValueError(f"message {number}: {named}, got {_kind(part.get(kind))}")
    if isinstance(part, dict) and "type" in part:
        wanted = 'text, or a file as {"type": "image", "image": FILE} or {"type": "audio", "audio": FILE}'
        raise ValueError(f"message {number}: expected {wanted}, got a part of type {kind!r}")
    raise ValueError(f"message {number}: each part of its content must be an object with a type, got {_kind(part)}")


def _kind(value: Any) -> str:
    """Returns JSON's name for the type of a value."""
    names = {dict: "an object", list: "a list", str: "a string", bool: str(value).lower(), type(None): "null"}
    return "an empty string" if value == "" else names.get(type(value), "a number")


def _check_turns(messages: list[Message]) -> None:
    """Raises ValueError if the speakers do not take turns: user and assistant, with tools after their calls."""
    first = int(bool(messages) and messages[0]["role"] == "system")
    wanted: tuple[str, ...] = ("user",)
    for number, message in enumerate(messages[first:], 1 + first):
        role = message["role"]
        if role not in wanted:
            raise ValueError(f"message {number} is by the {role}, expected the {' or the '.join(wanted)}")
        if role == "assistant":
            wanted = ("tool",) if message.get("tool_calls") else ("user",)
        else:
            wanted = ("assistant", "tool") if role == "tool" else ("assistant",)
    if len(messages) - first < 2:
        raise ValueError("nobody answers in it")
