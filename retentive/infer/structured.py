"""Structured output: restricts the tokens so that the text follows a JSON schema or a regular expression.

    engine.submit(ids, constraint=json_schema({"type": "object", …}, tokenizer))

llguidance (Rust, no dependencies, extra `structured`) parses the text so far and returns the allowed next tokens. JSON
is formatted as by `json.dumps`, with one space after commas and colons and no other: if white space were free, a weak
model might write nothing else. The text is only valid if max_tokens leaves room for its end. Limit strings
(maxLength), arrays (maxItems) and numbers in the schema if that matters.
"""

import functools
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retentive.data.tokenizer import Tokenizer
from retentive.data.tools import Notation
from retentive.infer.requests import Constraint
from retentive.options import quoted

STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""llguidance's options for white space in JSON: only after separators."""


def json_schema(schema: Mapping[str, Any], tokenizer: Tokenizer) -> Callable[[], Constraint]:
    """Returns a factory of constraints to JSON valid under `schema`; {"type": "object"} allows any object.

    Raises:
        ValueError: it is no schema, or uses an unsupported keyword (such as "not").
        ImportError: the extra is missing.
    """
    library = _library()
    if not isinstance(schema, Mapping):
        raise ValueError(f"a JSON schema must be an object, got {type(schema).__name__}")
    try:
        text = json.dumps(dict(schema))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the JSON schema is no JSON: {error}") from None
    grammar = library.LLMatcher.grammar_from_json_schema(text, overrides=STYLE)
    return _compiled(grammar, tokenizer, "JSON schema")


def regex(pattern: str, tokenizer: Tokenizer) -> Callable[[], Constraint]:
    """Returns a factory of constraints to text fully matched by `pattern` (Rust syntax: no look-around).

    Raises:
        ValueError: it is no regular expression.
        ImportError: the extra is missing.
    """
    library = _library()
    if not isinstance(pattern, str):
        raise ValueError(f"a regular expression must be a string, got {type(pattern).__name__}")
    return _compiled(library.LLMatcher.grammar_from_regex(pattern), tokenizer, "regular expression")


def tool_calls(
    tools: Mapping[str, Mapping[str, Any]],
    notation: Notation,
    tokenizer: Tokenizer,
    *,
    required: bool = False,
    several: bool = True,
    answer: Mapping[str, Any] | None = None,
    ends: Collection[int] = (),
) -> Callable[[], Constraint]:
    """Returns a factory of constraints to text that may end in calls of `tools`, whose arguments fit their schemas.

    Args:
        tools: name -> JSON schema of its arguments.
        notation: of the model's chat template.
        required: the text is calls and nothing else.
        several: allow more than one call, if the notation does.
        answer: JSON schema of an answer without calls; None: any text, which calls may follow.
        ends: token ids that end an answer, beside the end-of-text token.

    Raises:
        ValueError: a schema cannot be used; the message names its function.
        ImportError: the extra is missing.
    """
    if answer is not None:
        json_schema(answer, tokenizer)
    for name, schema in tools.items():  # one by one, since an error in the grammar of all would not name the function
        try:
            json_schema(schema, tokenizer)
        except ValueError as error:
            raise ValueError(f"function {name!r}: {error}") from None
    calls = [
        f"{json.dumps(name + notation.middle)} %json {json.dumps({**schema, 'x-guidance': STYLE})}"
        for name, schema in tools.items()
    ]
    more = f"({json.dumps(notation.between)} call)*" if several and notation.between else ""
    alone = required or answer is not None
    begin, end = json.dumps(notation.lead * alone + notation.begin), json.dumps(notation.end)
    # lazy: the text ends with the first mark of a call
    begins = f"begin: {begin}" if alone else f"begin[lazy]: TEXT {begin}"
    text = "TEXT" if answer is None else f"%json {json.dumps({**answer, 'x-guidance': STYLE})}"
    lines = [
        "%llguidance {}",
        f"start: {'' if required else 'text | '}begin call {more} {end}",
        begins,
        *([] if required else [f"text: {text}"]),
        *([] if alone else ["TEXT: /(.|\\n)*/"]),
        f"call: {' | '.join(calls)}",
    ]
    grammar = "\n".join(lines)
    return _compiled(grammar, tokenizer, "grammar of the tool calls", frozenset(ends))


def _compiled(
    grammar: str, tokenizer: Tokenizer, what: str, ends: frozenset[int] = frozenset()
) -> Callable[[], Constraint]:
    """Compiles the grammar once; each constraint is a copy of the matcher in its initial state."""
    library, table = _library(), _table(tokenizer)  # type: ignore[arg-type]
    if problem := library.LLMatcher.validate_grammar(grammar, table):
        raise ValueError(f"the {what} cannot be used: {_one_line(problem)}")
    first = library.LLMatcher(table, grammar, log_level=0)
    first.compute_bitmask()  # detects schemas that no text fits, as {"$ref": "#"}, before a request begins
    if first.is_error():
        raise ValueError(f"the {what} cannot be used: {_one_line(first.get_error())}")
    return lambda: Matcher(first.deep_copy(), tokenizer, ends)


class Matcher:
    """Constraint of one stream; `ends` are the tokens beside end-of-text that end it, once the text is complete."""

    def __init__(self, matcher: Any, tokenizer: Tokenizer, ends: frozenset[int] = frozenset()):
        self.matcher, self.eos_id, self.vocab_size = matcher, tokenizer.eos_id, tokenizer.vocab_size
        self.ends = sorted({self.eos_id, *ends})

    @property
    def complete(self) -> bool:
        return self.matcher.is_stopped()

    def mask(self) -> Tensor:
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        mask = np.unpackbits(bits, count=self.vocab_size, bitorder="little").astype(bool)
        # the library would also allow end of text inside a string, as an ordinary token; here it only ends the text
        mask[self.ends] = self.matcher.is_accepting()
        self._check()  # a grammar may turn out too large while it is followed
        return torch.from_numpy(mask)

    def accept(self, token: int) -> None:
        self.matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self.matcher.is_error():
            raise ValueError(f"structured output failed: {_one_line(self.matcher.get_error())}")


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ImportError("structured output needs llguidance: pip install 'retentive[structured]'") from None
    return llguidance


@functools.lru_cache(maxsize=8)
def _table(tokenizer: Tokenizer) -> Any:
    """Converts a tokenizer for the library, with the bytes of every token. Cached, since it can take seconds."""
    library, vocabulary = _library(), tokenizer.vocabulary()
    try:
        if isinstance(vocabulary, str):  # a tokenizer.json, which the library reads itself
            return library.LLTokenizer(vocabulary, n_vocab=tokenizer.vocab_size, eos_token=tokenizer.eos_id)
        wrapped = library.TokenizerWrapper(_Bytes(vocabulary, tokenizer))
        return library.LLTokenizer(wrapped, n_vocab=tokenizer.vocab_size)
    except Exception as error:  # the Rust library raises exceptions without a common type
        raise ValueError(f"structured output cannot use this tokenizer: {_one_line(str(error))}") from None


class _Bytes:
    """A vocabulary of bytes, with the attributes that the library's TokenizerWrapper reads."""

    def __init__(self, vocabulary: dict[int, bytes], tokenizer: Tokenizer):
        ids = range(tokenizer.vocab_size)
        # special tokens have no bytes but need distinct ones
        self.tokens = [vocabulary.get(id, f"<unused {id}>".encode()) for id in ids]
        self.special_token_ids = [id for id in ids if id not in vocabulary]
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, None
        self.encode = tokenizer.encode

    def __call__(self, text: bytes | str) -> list[int]:
        return self.encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


def _one_line(message: str) -> str:
    """Returns the line of a parser's message that states the error; the others draw arrows around it."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["no reason given"]
    return quoted(next((line for line in lines if line.startswith("error:")), lines[0]))
