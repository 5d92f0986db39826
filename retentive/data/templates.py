"""Chat templates: conversations as token ids, by the model's own template or a built-in one, in jinja's sandbox.

    template = load_template(folder, tokenizer)
    template.first(messages)    a conversation, up to where the answer begins
    template.next(messages)     what follows an answer that the model's state already holds

User text stays text: the name of a special token in a message is encoded as plain characters (no prompt injection by
special tokens), while names in the template itself become tokens. `sandbox.py` runs the templates.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retentive.data.media import KINDS, placeholder, placeholder_id, placeholders, text_of
from retentive.data.sandbox import compiled
from retentive.data.tokenizer import END_OF_TEXT, Tokenizer
from retentive.data.tools import Call, Notation, find_notation

TEMPLATE = "chat_template.jinja"
"""File of a model folder that holds its chat template."""
BUILT_IN = """\
{{- eos_token -}}
{%- for message in messages -%}
{%- if message.role == 'system' %}{{ message.content | trim }}

{% else %}{{ 'User' if message.role == 'user' else 'Assistant' }}: {{ message.content | trim }}
{% endif -%}
{%- endfor -%}
Assistant:"""

TURNS = """\
{{- eos_token -}}
{%- if tools %}Tools:
{% for tool in tools %}{{ tool.function | tojson }}
{% endfor %}

{% endif -%}
{%- for message in messages -%}
{%- if message.role == 'system' %}{{ message.content | trim }}

{% elif message.role == 'assistant' %}Assistant: {{ message.content | trim }}
{%- for call in message.tool_calls %}{{ '\\n' if loop.index > 1 or message.content }}<tool_call>\
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>{% endfor %}\
{{ eos_token }}
{% else %}{{ 'User' if message.role == 'user' else 'Tool' }}: {{ message.content | trim }}
{% endif -%}
{%- endfor -%}
Assistant:"""
"""Template for training on conversations if the model has none: an answer ends with end-of-text. A model that was not
trained this way starts another document there, so BUILT_IN suits it better."""

ANSWER = "\ue000\ue001"
"""Stand-in for an answer, to find the text around it; no message contains it (see `_shielded`)."""
QUESTION = "\ue002"
"""Stand-in for a question."""
PROBE = "Is 1 < 2, Åse? naïve…"
"""An answer that shows any change of its letters."""
SHIELDED = re.compile("\ue000([0-9a-f]+)\ue001")

Message = Mapping[str, Any]
"""A role and a content: text, or a list of texts and `Media`. An answer's `tool_calls` are OpenAI's, with arguments as
objects."""
Tool = Mapping[str, Any]
"""Description of a function, as in OpenAI's API: `{"type": "function", "function": {"name": …, "parameters": …}}`."""


class ChatTemplate:
    """A chat template, checked by rendering it once.

    Args:
        source: jinja source.
        special: name -> id of the special tokens, which the template may emit.
        own: True if it came with the model.
        bos: the beginning-of-text token, called `bos_token` in templates.

    Raises:
        ValueError: it does not compile, cannot render a plain conversation, or tries to leave the sandbox.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, special: Mapping[str, int], *, own: bool, bos: str = ""):
        self.tokenizer, self.special, self.own, self.bos = tokenizer, dict(special), own, bos
        self.source = source
        self.eos = next((name for name, id in special.items() if id == tokenizer.eos_id), END_OF_TEXT)
        self.special[self.eos] = tokenizer.eos_id
        self.special |= {placeholder(kind): placeholder_id(kind, tokenizer) for kind in KINDS}
        names = sorted(self.special, key=len, reverse=True)  # longest first: a regular expression takes the first match
        self._special = re.compile("(" + "|".join(map(re.escape, names)) + ")")
        self._to_shield = re.compile("|".join(map(re.escape, ["\ue000", *names])))
        self._template = compiled(source)
        self.first([{"role": "user", "content": "."}])  # refuse a template that cannot render now, not at a request
        self.stop_ids, self.stop = self._ends()

    def first(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """Returns the ids of a whole conversation.

        Args:
            tools: functions that the model may call, as in OpenAI's API; see `notation`.

        Raises:
            ValueError: the template refuses these messages.
        """
        return self._encode(self._render(self._shielded(messages), tools=self._shielded_all(list(tools))))

    @functools.cached_property
    def shows_tools(self) -> bool:
        """True if the template shows tools and calls in a notation that is served."""
        try:
            return bool(self.notation)
        except ValueError:
            return False

    @functools.cached_property
    def notation(self) -> Notation:
        """Notation of tool calls in this template; raises ValueError if it has none that is served."""
        return find_notation(self._render, self._special)

    def next(self, messages: Sequence[Message]) -> list[int]:
        """Returns the ids of `messages` in a continued session, preceded by the template's text after an answer.

        The earlier conversation is in the state and is not rendered again. Raises as `first`.
        """
        after = self._after_answer(self._shielded(messages))
        if after is None:
            raise ValueError("the chat template does not show each message once: a session cannot go on with it")
        return self._encode(after)

    def taught(
        self, conversations: Sequence[Sequence[Message]], tools: Sequence[Sequence[Tool]] | None = None
    ) -> list[tuple[list[int], list[bool]]]:
        """Returns (ids, True for each id of an answer that is learnt) of whole conversations, for training.

        An answer includes its tool calls and the token that ends it. It is not learnt if its message has the `weight`
        0. The ids equal those of `first`, the answers and `next` in turn, so training sees what a session reads.

        Args:
            tools: functions that each conversation may call; None: none.

        Raises:
            ValueError: the template refuses the messages or cannot be trained with: it does not show each answer once,
                right after its prompt for one, or it ends answers with no special token.
        """
        tools = tools or [()] * len(conversations)
        spelt = [self._spelt(messages, of_one) for messages, of_one in zip(conversations, tools, strict=True)]
        # one call for all texts: one per text would take most of the time
        texts = iter(self.tokenizer.encode_batch([x for each in spelt for x, _ in each if isinstance(x, str)]))
        found = []
        for each in spelt:
            ids, answers = list[int](), list[bool]()
            for x, answered in each:
                more = next(texts) if isinstance(x, str) else [x]
                ids += more
                answers += [answered] * len(more)
            found.append((ids, answers))
        return found

    def texts(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[str]:
        """Returns the separately encoded texts of a conversation, to learn a tokenizer from.

        Raises:
            ValueError: as `taught`.
        """
        return [x for x, _ in self._spelt(messages, tools) if isinstance(x, str)]

    def pieces(self) -> dict[str, Any]:
        """Returns the template in pieces, for programs without jinja, each as texts and special tokens' ids in turn.

        The pieces are: before the first message (`start`), before later questions (`question`) and answers (`answer`),
        and at the `end`. Also `trim`, True if messages are stripped of white space, and `ends` and `stop`, the ids and
        strings that end an answer.

        Raises:
            ValueError: the template does more than these pieces can express.
        """
        question, answer = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
        found = self._render([question, answer, question]).split(QUESTION)
        middle = found[1].split(ANSWER) if len(found) == 3 else []
        if len(middle) != 2:
            raise ValueError("the chat template does not show each message once")
        start, end, (before_answer, before_question) = found[0], found[2], middle
        turn = ANSWER.join(middle)
        padded = self._render([{**question, "content": f"  {QUESTION}\n"}])
        trim = padded == start + QUESTION + end
        same = {
            self._render([question]): start + QUESTION + end,
            padded: start + (QUESTION if trim else f"  {QUESTION}\n") + end,
            self._render([question, answer] * 2 + [question]): start + (QUESTION + turn) * 2 + QUESTION + end,
            self._after_answer([question]): before_question + QUESTION + end,
        }
        if any(got != wanted for got, wanted in same.items()):
            raise ValueError("the chat template treats messages otherwise by their place")
        parts = {"start": start, "question": before_question, "answer": before_answer, "end": end}
        apart = {name: [x for x, _ in self._split(part, False)] for name, part in parts.items()}
        return {**apart, "trim": trim, "ends": sorted(self.stop_ids), "stop": list(self.stop)}

    def _spelt(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[tuple[str | int, bool]]:
        """Returns a conversation as texts and special tokens, each with True if it belongs to an answer to learn."""
        said = self._shielded(messages)
        answers = [message for message in said if message["role"] == "assistant"]
        learnt = [answer.get("weight", 1) != 0 for answer in answers]
        blank = [m if m["role"] != "assistant" else {"role": m["role"], "content": ANSWER} for m in said]
        parts = self._render(blank, tools=self._shielded_all(list(tools))).split(ANSWER)
        if len(parts) != len(answers) + 1:
            raise ValueError("the chat template does not show each answer once: it cannot be taught")
        lead = self._lead
        spelt: list[tuple[str | int, bool]] = []
        for before, answer, now, then in zip(parts, answers, learnt, [False, *learnt], strict=False):
            if not before.endswith(lead):
                raise ValueError(f"the chat template does not put {lead!r} before each answer: it cannot be taught")
            start = 0
            if spelt:
                start = self._end_of_answer(before)
                spelt += self._split(before[:start], then)
            spelt += self._split(before[start : len(before) - len(lead)], False)
            spelt += self._split(self._answer(answer), now)
        return spelt + self._split(parts[-1][: self._end_of_answer(parts[-1])], learnt[-1])

    def _answer(self, message: Message) -> str:
        """Returns all that the model writes for an assistant's shielded message: its text and its tool calls."""
        calls = [call["function"] for call in message.get("tool_calls", ())]
        lead, text = self._lead, message["content"]
        if not calls:
            return lead + text
        made = [Call(call["name"], json.dumps(call["arguments"], ensure_ascii=False)) for call in calls]
        if not self.shows_tools:
            raise ValueError("the chat template shows no tool calls: give one that does (`template`)")
        return (lead if text else "") + self.notation.answer(text, made)

    @functools.cached_property
    def _lead(self) -> str:
        """Text between the point where the model starts to write and the answer's first character."""
        question = [{"role": "user", "content": "."}]
        asked = self._render(question)
        shown = self._render([*question, {"role": "assistant", "content": ANSWER}])
        if PROBE not in self._render([*question, {"role": "assistant", "content": PROBE}]):
            raise ValueError("the chat template changes the letters of an answer: it cannot be taught")
        before = shown.split(ANSWER)[0]
        if not before.startswith(asked):
            raise ValueError("the chat template asks for an answer otherwise than it shows one: it cannot be taught")
        lead = before[len(asked) :]
        if lead.strip() and asked == self._render(question, ask=False):
            raise ValueError(
                f"the chat template shows {lead.strip()!r} before an answer and does not ask for one with it: "
                "put that under {% if add_generation_prompt %} at the end"
            )
        return lead

    def _end_of_answer(self, after: str) -> int:
        """Returns how many characters rendered after an answer belong to its end."""
        space = len(after) - len(after.lstrip())
        if not (found := self._special.match(after, space)):
            known = ", ".join(sorted(self.special)[:8])
            raise ValueError(
                f"the chat template ends answers with no special token: it cannot be taught (the tokenizer has {known})"
            )
        return found.end()

    def _split(self, rendered: str, answered: bool) -> list[tuple[str | int, bool]]:
        """Splits rendered text into texts and special tokens' ids, without empty ones."""
        parts = self._special.split(rendered)  # every second part is a special token's name
        found = [self.special[part] if n % 2 else self._plain(part) for n, part in enumerate(parts)]
        return [(x, answered) for x in found if x != ""]

    def _plain(self, rendered: str) -> str:
        """Restores shielded names in rendered text."""
        return SHIELDED.sub(lambda found: bytes.fromhex(found[1]).decode(), rendered)

    def _after_answer(self, messages: Sequence[Message]) -> str | None:
        """Returns the text between an answer and `messages`, with these; None if the answer is not shown once."""
        before = [{"role": "user", "content": "."}, {"role": "assistant", "content": ANSWER}]
        parts = self._render([*before, *messages]).split(ANSWER)
        return parts[1] if len(parts) == 2 else None

    def _ends(self) -> tuple[frozenset[int], tuple[str, ...]]:
        """Returns (stop ids, stop strings): the token that the template puts after an answer, or else the text."""
        ends, after = {self.tokenizer.eos_id}, self._after_answer([{"role": "user", "content": QUESTION}])
        between = (after or "").split(QUESTION)[0]
        if found := self._special.match(between.lstrip()):
            return frozenset({*ends, self.special[found[0]]}), ()
        return frozenset(ends), (between.rstrip(),) if between.strip() else ()

    def _render(self, messages: Sequence[Message], *, ask: bool = True, tools: Sequence[Tool] = ()) -> str:
        """Renders the messages, with `ask` up to where the answer begins."""
        values = {
            "messages": list(messages),
            "tools": list(tools) or None,
            "add_generation_prompt": ask,
            "bos_token": self.bos,
            "eos_token": self.eos,
        }
        return self._template(values)

    def _shielded(self, messages: Sequence[Message]) -> list[Message]:
        """Hides special tokens' names in messages as hexadecimal; names left after rendering are the template's own."""

        shielded = list[Message]()
        for message in messages:
            calls = {"tool_calls": self._shielded_all(x)} if (x := message.get("tool_calls")) else {}
            content = text_of(message["content"], placeholders, self._shield)
            shielded.append({**message, "content": content, **calls})
        return shielded

    def _shielded_all(self, value: Any) -> Any:
        """Hides special tokens' names in all strings of a value in JSON."""
        if isinstance(value, str):
            return self._shield(value)
        if isinstance(value, Mapping):
            return {self._shield(name): self._shielded_all(each) for name, each in value.items()}
        return [self._shielded_all(each) for each in value] if isinstance(value, list) else value

    def _shield(self, text: str) -> str:
        return self._to_shield.sub(lambda found: f"\ue000{found[0].encode().hex()}\ue001", text)

    def _encode(self, rendered: str) -> list[int]:
        """Encodes rendered text: special tokens' names in it are the template's own, all else is text."""
        parts = self._special.split(rendered)  # every second part is a special token's name
        texts = list(map(self._plain, parts[::2]))
        ids = self.tokenizer.encode_batch(texts)  # releases the GIL, unlike `encode`
        for n, part in enumerate(parts[1::2]):
            ids[n].append(self.special[part])
        return [id for each in ids for id in each]


def load_template(
    model: Path | Mapping[str, Any], tokenizer: Tokenizer, file: Path | None = None, *, default: str = BUILT_IN
) -> ChatTemplate:
    """Loads the template in `file`, else the one that came with the model, else the default.

    Args:
        model: folder of the model, or the content of its tokenizer_config.json.

    Raises:
        FileNotFoundError: `file` does not exist.
        ValueError: the template is refused; see ChatTemplate.
    """
    config = model if isinstance(model, Mapping) else _read_json(model / "tokenizer_config.json")
    source, origin = _find(model, config, file)
    special = tokenizer.special
    bos = config.get("bos_token")
    bos = bos.get("content") if isinstance(bos, dict) else bos
    try:
        return ChatTemplate(
            default if source is None else source,
            tokenizer,
            special,
            own=source is not None,
            bos=bos if isinstance(bos, str) and bos in special else "",
        )
    except ValueError as error:
        raise ValueError(f"{origin} is refused: {error}") from None


def template_of(model: Path | Mapping[str, Any]) -> str | None:
    """Returns the source of the template that came with a model, named as for `load_template`; None if it has none."""
    config = model if isinstance(model, Mapping) else _read_json(model / "tokenizer_config.json")
    return _find(model, config, None)[0]


def _find(
    model: Path | Mapping[str, Any], config: Mapping[str, Any], file: Path | None
) -> tuple[str | None, Path | str]:
    """Returns (source, its file); the source is None for the built-in template."""
    if file is None and isinstance(model, Path) and (model / TEMPLATE).is_file():
        file = model / TEMPLATE
    if file is not None:
        if not file.is_file():
            raise FileNotFoundError(f"no chat template at {file}")
        try:
            return file.read_text(encoding="utf-8"), file
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text ({error.reason} at {error.start})") from None
    source = config.get("chat_template")
    if isinstance(source, list):  # several by name, as one for tools
        source = next((each["template"] for each in source if each.get("name") == "default"), None)
    return source, model / "tokenizer_config.json" if isinstance(model, Path) else "the model's chat template"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError:
        raise ValueError(f"{file} is not JSON: the model folder is damaged") from None
    return value if isinstance(value, dict) else {}
