"""Jinja's sandbox for chat templates, which are programs from the internet.

A template sees no attributes of Python objects, and its ranges, products and output are bounded; one that tries more is
refused. It can still use much memory, by concatenation.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

MOST_CHARACTERS = 16 << 20
"""Maximum number of characters that a template outputs, or that a product of strings in it has."""
MOST_ROUNDS = 100_000
"""Maximum sum of numbers that all `range` calls of one rendering produce."""


class _BoundedRange:
    """Replaces `range` in templates: all ranges of one rendering together yield at most MOST_ROUNDS numbers."""

    def __init__(self) -> None:
        self.left = MOST_ROUNDS

    def __call__(self, *bounds: int) -> Iterator[int]:
        made = range(*bounds)
        if len(made) > self.left:
            raise ValueError(f"its ranges have more than {MOST_ROUNDS} rounds")
        self.left -= len(made)
        return made  # type: ignore[return-value]


def compiled(source: str) -> Callable[[Mapping[str, Any]], str]:
    """Returns a function that renders a template with its variables.

    The function raises ValueError if the template fails, or tries more than it may.

    Raises:
        ValueError: the template does not compile.
        ImportError: jinja2 is missing.
    """
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ImportError("chat templates need jinja2: pip install 'retentive[serve]'") from None

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**", "%"})

        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            raise ValueError(f"it reaches for {attribute!r} of {type(obj).__name__}, which is out of its sandbox")

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            # "%999999999d" % 1 pads to any width, and 9 ** 9 ** 9 never ends
            if operator != "*" and (isinstance(left, str) or operator == "**"):
                raise ValueError(f"the operator {operator} is not allowed here")
            if operator == "*" and _length(left) * _length(right) > MOST_CHARACTERS:
                raise ValueError(f"a product in it has more than {MOST_CHARACTERS} characters")
            return super().call_binop(context, operator, left, right)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    # Functions that transformers offers to templates, with the same results: its tojson does not escape for HTML.
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        template = environment.from_string(source)
    except TemplateError as error:
        raise ValueError(f"it does not compile: {_one_line(error)}") from None
    return lambda values: _rendered(template, values)


def _rendered(template: Any, values: Mapping[str, Any]) -> str:
    pieces, size = [], 0
    try:
        for piece in template.generate(**values, range=_BoundedRange()):
            pieces.append(piece)
            size += len(piece)
            if size > MOST_CHARACTERS:
                raise ValueError(f"it gives out more than {MOST_CHARACTERS} characters")
    except Exception as error:  # the template is a program and may raise anything
        raise ValueError(f"the chat template fails: {_one_line(error)}") from None
    return "".join(pieces)


def _length(x: Any) -> int:
    """Returns the factor by which x lengthens a product."""
    return abs(x) if isinstance(x, int) else len(x) if isinstance(x, (str, list, tuple)) else 1


def _raise(message: str) -> None:
    raise ValueError(message)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
