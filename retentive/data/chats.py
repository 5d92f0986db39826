"""Conversations from files: the usual schemas in, checked messages out. Errors name file and line.

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}, …]}
    {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}, …]}     ShareGPT's
    {"prompt": "…", "completion": "…"}                           a question and its answer; either may be messages too
    {"instruction": "…", "input": "…", "output": "…"}            Alpaca's; the input, which may lack, ends the question

Each is one line of .jsonl, an entry of a list in .json, or a row of .parquet. Other fields are ignored. A content may
be a list of parts: {"type": "text", "text": …}, {"type": "image", "image": FILE}, {"type": "audio", …}, where FILE may
also be a member of an archive or a row of an array (`archives`). A conversation may begin with a system message, then
user and assistant alternate. A last message without an answer is dropped, since it teaches nothing.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from retentive.data.formats import OnBadText, TextCheck, kind_of, objects
from retentive.data.media import KINDS as KINDS_OF_MEDIA
from retentive.data.media import Media, Open, media_of, text_of
from retentive.data.sources import Say, find_files
from retentive.data.templates import Message
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
    """An optional system message, then user and assistant in turns, ending with an assistant's message."""

    @property
    def text(self) -> str:
        """The messages' text, one message per line."""
        return "\n".join(text_of(message["content"]) for message in self.messages)


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
                except (ValueError, OSError) as error:
                    check.bad(f"{path}{within}", f"cannot be taken: {error}", "fix it")
                    first = first or f"{path}{within}: {error}"
                    continue
                empty = False
                yield Conversation(name + within, messages)
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
        said = [("user", _alpaca(value)), ("assistant", value["output"])]
    else:
        got = ", ".join(f"{name} (null)" if x is None else str(name) for name, x in value.items())
        raise ValueError(f"expected {SCHEMAS}, got {got or 'no field'}")
    messages = [_message(number, *each, media) for number, each in enumerate(said, 1)]
    if media is not None and not media_of(messages) and (beside := [name for name in BESIDE if value.get(name)]):
        kind = BESIDE[beside[0]]
        part = f'{{"type": "{kind}", "{kind}": FILE}}'
        raise ValueError(f"{beside[0]!r} stands beside what is said: put {part} into the content of the message")
    _check_turns([m["role"] for m in messages])
    return messages if messages[-1]["role"] == "assistant" else messages[:-1]


def _alpaca(value: dict[str, Any]) -> Any:
    """Returns the question of an object in Alpaca's schema: the instruction, and the input below it if there is one."""
    asked, given = value["instruction"], value.get("input")
    if given in (None, "") or not isinstance(asked, str):  # what is no text is refused with the message
        return asked
    if not isinstance(given, str):
        raise ValueError(f"input must be text, got {_kind(given)}")
    return f"{asked}\n\n{given}" if given.strip() else asked


def _listed(name: str, value: Any, role: str, content: str) -> list[tuple[Any, Any]]:
    """Returns (role, content) of each entry of a list under `name`."""
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise ValueError(f"{name} must be a list of objects")
    for number, entry in enumerate(value, 1):
        if missing := [field for field in (role, content) if field not in entry]:
            raise ValueError(f"{name}, entry {number}: has no {missing[0]!r}")
    return [(entry[role], entry[content]) for entry in value]


def _side(value: dict[str, Any], name: str, role: str) -> list[tuple[Any, Any]]:
    return _listed(name, value[name], "role", "content") if isinstance(value[name], list) else [(role, value[name])]


def _message(number: int, role: Any, content: Any, media: Callable[[str, str], Media] | None) -> Message:
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
    if not any(found):
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


def _check_turns(roles: list[str]) -> None:
    turns = roles[1:] if roles[:1] == ["system"] else roles
    for number, role in enumerate(turns, 1 + len(roles) - len(turns)):
        wanted = "user" if (number - len(roles) + len(turns)) % 2 else "assistant"
        if role != wanted:
            raise ValueError(f"message {number} is by the {role}, expected the {wanted}")
    if len(turns) < 2:
        raise ValueError("nobody answers in it")
