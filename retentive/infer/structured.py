"""Structured output: a model may pick only tokens that keep its text within a JSON schema or a regular expression.

    engine.submit(ids, constraint=json_schema({"type": "object", …}, tokenizer))

llguidance (Rust, no dependencies, extra `structured`) parses what was written and says which tokens may follow. JSON
comes as `json.dumps` writes it, with a space after each comma and colon and no other: where white space is free, a weak
model may write nothing else. The text is valid only if max_tokens leaves room for its end: bound strings (maxLength),
arrays (maxItems) and numbers in the schema where that matters.
"""

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retentive.data.tokenizer import Tokenizer
from retentive.infer.requests import Constraint

STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""llguidance's options for white space in JSON: none but these two."""


def json_schema(schema: Mapping[str, Any], tokenizer: Tokenizer) -> Callable[[], Constraint]:
    """A function that makes constraints to JSON valid under `schema`; {"type": "object"} allows any object.

    Raises:
        ValueError: not a schema, or one with a keyword that is not supported (such as "not").
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
    """A function that makes constraints to text that `pattern` matches as a whole (Rust's syntax: no look-around).

    Raises:
        ValueError: not a regular expression.
        ImportError: the extra is missing.
    """
    library = _library()
    if not isinstance(pattern, str):
        raise ValueError(f"a regular expression must be a string, got {type(pattern).__name__}")
    return _compiled(library.LLMatcher.grammar_from_regex(pattern), tokenizer, "regular expression")


def _compiled(grammar: str, tokenizer: Tokenizer, what: str) -> Callable[[], Constraint]:
    """The grammar compiled once; each constraint is a copy of the matcher in its first state."""
    library, table = _library(), _table(tokenizer)  # type: ignore[arg-type]
    if problem := library.LLMatcher.validate_grammar(grammar, table):
        raise ValueError(f"the {what} cannot be used: {_one_line(problem)}")
    first = library.LLMatcher(table, grammar, log_level=0)
    first.compute_bitmask()  # finds schemas that no text ever fits, such as {"$ref": "#"}, before a request begins
    if first.is_error():
        raise ValueError(f"the {what} cannot be used: {_one_line(first.get_error())}")
    return lambda: Matcher(first.deep_copy(), tokenizer)


class Matcher:
    """The `Constraint` of one stream."""

    def __init__(self, matcher: Any, tokenizer: Tokenizer):
        self.matcher, self.eos_id, self.vocab_size = matcher, tokenizer.eos_id, tokenizer.vocab_size

    @property
    def complete(self) -> bool:
        return self.matcher.is_stopped()

    def mask(self) -> Tensor:
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        mask = np.unpackbits(bits, count=self.vocab_size, bitorder="little").astype(bool)
        # the library would allow end of text inside a string too, as an ordinary token: here it only ends the text
        mask[self.eos_id] = self.matcher.is_accepting()
        self._check()  # a grammar may turn out too large only while it is being followed
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
    """The library's view of a tokenizer, the bytes of every token; takes seconds for a large vocabulary, so kept."""
    library, vocabulary = _library(), tokenizer.vocabulary()
    try:
        if isinstance(vocabulary, str):  # a tokenizer.json, which the library can read itself
            return library.LLTokenizer(vocabulary, n_vocab=tokenizer.vocab_size, eos_token=tokenizer.eos_id)
        wrapped = library.TokenizerWrapper(_Bytes(vocabulary, tokenizer))
        return library.LLTokenizer(wrapped, n_vocab=tokenizer.vocab_size)
    except Exception as error:  # the Rust side raises exceptions of no common type
        raise ValueError(f"structured output cannot use this tokenizer: {_one_line(str(error))}") from None


class _Bytes:
    """A vocabulary of bytes with the attributes that the library's TokenizerWrapper asks for."""

    def __init__(self, vocabulary: dict[int, bytes], tokenizer: Tokenizer):
        ids = range(tokenizer.vocab_size)
        # special tokens have no bytes but need some, different for each
        self.tokens = [vocabulary.get(id, f"<unused {id}>".encode()) for id in ids]
        self.special_token_ids = [id for id in ids if id not in vocabulary]
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, None
        self.encode = tokenizer.encode

    def __call__(self, text: bytes | str) -> list[int]:
        return self.encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


def _one_line(message: str) -> str:
    """The line of a parser's message that says what is wrong; the others draw arrows around it."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["no reason given"]
    return next((line for line in lines if line.startswith("error:")), lines[0])
