"""From the arguments of a verb to its command: the parser, its help, and which options were typed."""

import ast
import inspect
import io
import re
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import fields, is_dataclass
from itertools import pairwise
from textwrap import dedent
from types import MappingProxyType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from retentive.cli.errors import as_typed

Command = TypeVar("Command")

SENTENCES = {
    r"Error parsing (\S+): no type matching (?:\{None\}.)?(.*?) could be .* from \['(.*?)'\].*": r"\1 \3: expected \2",
    r"Error parsing (\S+): invalid literal for int\(\) .*?'(.*)'": r"\1 \2: expected INT",
    r"Error parsing (\S+): could not convert string to float: '(.*)'": r"\1 \2: expected FLOAT",
    r"Error parsing (\S+): ": r"\1: ",
    r"invalid choice '(.*?)' for argument '(.*?)'. Expected one of \((.*?),?\)\.": r"\2 \1: expected one of \3",
    r"Unrecognized options: ": "unknown option ",
    r"Missing from .*?: (.*)": r"missing: \1",
}
"""The parser's sentences, and ours."""
KINDS = {"INT": "a whole number", "FLOAT": "a number"}
"""The parser's names of types in errors, and ours."""
MAPPINGS = ConstructorRegistry()
"""Rule of the parser for options that map names to values."""


@MAPPINGS.primitive_rule
def mapping(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Parse FIELD=VALUE FIELD=VALUE … into a dictionary."""
    if get_origin(info.type) is not Mapping or get_args(info.type)[0] is not str:
        return None  # such as a bias for tokens, which the parser reads itself
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="FIELD=VALUE",
        instance_from_str=dict.fromkeys,  # read afterwards: an error is then one line, and not the parser's box
        is_instance=lambda value: isinstance(value, Mapping),
        str_from_instance=lambda value: as_typed(value).split(" "),
    )


def parse(kind: type[Command], program: str, argv: Sequence[str], **how: Any) -> Command:
    """Parse arguments into a command; ends the process after --help.

    Args:
        kind: the command's dataclass. The docstrings of its fields become the help.
        program: "retentive VERB", for the usage.
        how: further options of `tyro.cli`.

    Raises:
        ValueError: arguments are missing, unknown or of a wrong type.
    """
    if {"-h", "--help"} & set(argv):
        join_help(kind)
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(kind, prog=program, args=list(argv), registry=MAPPINGS, **how)
    except SystemExit as stop:
        if not stop.code:
            raise
    raise ValueError(f"{one_line(said.getvalue())} ({program} --help)")


def one_line(box: str) -> str:
    """Returns the parser's error, which it prints in a box of several lines and sections, on one line."""
    sections: list[list[str]] = [[]]
    for line in box.splitlines():
        if re.search("──|-----", line):
            sections.append([])
        else:
            sections[-1].append(line[2:].rstrip(" │"))
    title = "│" not in box  # a terminal of ASCII gets it as a section of its own, others in the box's first line
    first, *others = [lines for lines in sections if any(lines)][title:]
    # options stand four columns to the right, each with its type, and their help eight
    text = " ".join(line.split()[0] if line[:4] == "    " else line.strip() for line in first if line[:8].strip())
    for pattern, ours in SENTENCES.items():
        text = re.sub(f"^{pattern}", ours, text)
    for word, meaning in KINDS.items():
        text = re.sub(rf"\b{word}\b", meaning, text)
    meant = [line.split()[0] for lines in others if "Perhaps" in lines[0] for line in lines if line[:6] == "    --"]
    return text + (f", perhaps {' or '.join(meant)}" if meant else "")


def join_help(kind: Any) -> None:
    """Gives each field of a dataclass, and of those within it, its docstring as help, joined to one paragraph.

    The parser itself would take a docstring of several lines for several paragraphs.
    """
    hints = get_type_hints(kind)
    for f in fields(kind):
        for inner in (hints[f.name], *get_args(hints[f.name])):
            if isinstance(inner, type) and is_dataclass(inner):
                join_help(inner)
    for base in filter(is_dataclass, kind.__mro__):
        for name, text in docstrings(base).items():
            own = base.__dataclass_fields__[name]
            own.metadata = MappingProxyType({**own.metadata, "help": " ".join(text.split())})


def docstrings(kind: Any) -> dict[str, str]:
    """Returns the docstrings below the annotated fields of a class itself; none of a class made at run time."""
    try:
        source = inspect.getsource(kind)
    except OSError:
        return {}
    found = {}
    for field, below in pairwise(ast.parse(dedent(source)).body[0].body):  # type: ignore[attr-defined]
        text = below.value if isinstance(below, ast.Expr) else None
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Constant):
            found[ast.unparse(field.target)] = str(text.value)
    return found


def typed_options(argv: list[str]) -> set[str]:
    """Return the names of the typed options, as fields."""
    return {a.split("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_") for a in argv if a[:2] == "--"}


def check_once(argv: Sequence[str], *names: str) -> None:
    """Raises ValueError if an option that takes several values is given twice, since only the last would count."""
    for name in names:
        if sum(word.split("=")[0] == f"--{name}" for word in argv) > 1:
            raise ValueError(f"--{name} stands twice: give all its values after one --{name}")
