"""From the arguments of a verb to its command: the parser, its help, and which options were typed."""

import ast
import difflib
import inspect
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import fields, is_dataclass
from itertools import pairwise
from textwrap import dedent
from types import MappingProxyType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from retentive.cli import ALIASES
from retentive.cli.errors import as_typed

Command = TypeVar("Command")

SENTENCES = {
    r"Error parsing (\S+): no type matching (?:\{None\}.)?(.*?) could be .* from \['(.*?)'\].*": r"\1 \3: expected \2",
    r"Error parsing (\S+): invalid literal for int\(\) .*?'(.*)'": r"\1 \2: expected INT",
    r"Error parsing (\S+): could not convert string to float: '(.*)'": r"\1 \2: expected FLOAT",
    r"Error parsing (\S+): Could not find valid parse for arguments: \['(.*?)'.*\]": r"\1 \2: expected another type",
    r"Error parsing (\S+): ": r"\1: ",
    r"invalid choice '(.*?)' for argument '(.*?)'. Expected one of \((.*?),?\)\.": r"\2 \1: expected one of \3",
    r"Unrecognized options: (?!-)": "unexpected argument ",
    r"Unrecognized options: ": "unknown option ",
    r"Missing from .*?: (.*)": r"missing: \1",
    r"Missing value for argument '(.*?)'.*": r"\1 needs a value",
}
"""The parser's sentences, and ours."""
KINDS = {"INT": "a whole number", "FLOAT": "a number"}
"""The parser's names of types in errors, and ours."""
MAPPINGS = ConstructorRegistry()
"""Rule of the parser for options that map names to values."""


@MAPPINGS.primitive_rule
def mapping(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Parse FIELD=VALUE FIELD=VALUE … into a dictionary, or NAME:FIELD=VALUE,FIELD=VALUE … into one of dictionaries."""
    if get_origin(info.type) is not Mapping or get_args(info.type)[0] is not str:
        return None  # such as a bias for tokens, which the parser reads itself
    named = get_origin(get_args(info.type)[1]) is Mapping
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME:FIELD=VALUE" if named else "FIELD=VALUE",
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
        how["description"] = joined(str(how.get("description", kind.__doc__)))
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(kind, prog=program, args=join_mappings(kind, argv), registry=MAPPINGS, **how)
    except SystemExit as stop:
        if not stop.code:
            raise
    raise ValueError(f"{unknown_option(kind, argv) or one_line(said.getvalue())} ({program} --help)")


def join_mappings(kind: Any, argv: Sequence[str]) -> list[str]:
    """Returns the arguments with the values of --set A=1 … --set B=2 after one --set.

    A later A replaces an earlier one. The parser itself would keep the last option's values alone.
    """
    given = dict[str, list[list[str]]]((f"--{name}", []) for name in mapping_names(kind))
    others, current = list[str](), None
    for word in argv:
        option, equals, value = word.partition("=")
        if word.startswith("-"):
            current = given.get(option.replace("_", "-"))
            if current is not None:
                current.append([value] if equals else [])
                continue
        (others if current is None else current[-1]).append(word)
    for option, groups in given.items():
        others += [option] if groups else []
        for n, group in enumerate(groups):
            later = {name_of(value) for after in groups[n + 1 :] for value in after}
            others += [value for value in group if name_of(value) not in later]
    return others


def name_of(value: str) -> str:
    """Returns NAME of NAME=VALUE or NAME:FIELD=VALUE,…"""
    return re.split("[=:]", value, maxsplit=1)[0]


def unknown_option(kind: Any, argv: Sequence[str]) -> str:
    """Returns the error for the first unknown option among the arguments, with the nearest known one; "" without any.

    The parser itself would rather tell of a required option that is missing for a typing error in its name.
    """
    ours = ["help", *option_names(kind)]
    meant = {other[2:]: own[2:] for other, own in ALIASES.items() if own[2:] in ours} | {name: name for name in ours}
    for word in argv:
        name = word.partition("=")[0].replace("_", "-")
        if name[:2] == "--" and name[2:].removeprefix("no-") not in ours:
            close = difflib.get_close_matches(name[2:], meant, 1)
            return f"unknown option {name}" + (f": did you mean --{meant[close[0]]}?" if close else "")
    return ""


def option_names(kind: Any) -> Iterator[str]:
    """Yields the names of the options of a dataclass, without dashes before them, also of dataclasses within it."""
    for name, inner in nested(kind):
        if inner is None:
            yield name.replace("_", "-")
        else:
            yield from option_names(inner)


def mapping_names(kind: Any) -> Iterator[str]:
    """Yields the names of the options that `mapping` parses, also of dataclasses within it."""
    hints = get_type_hints(kind)
    for name, inner in nested(kind):
        if inner is not None:
            yield from mapping_names(inner)
        elif get_origin(hints[name]) is Mapping and get_args(hints[name])[0] is str:
            yield name.replace("_", "-")


def nested(kind: Any) -> Iterator[tuple[str, Any]]:
    """Yields (name of a field, the dataclass in it or None) for each field of a dataclass."""
    hints = get_type_hints(kind)
    for f in fields(kind):
        kinds = (hints[f.name], *get_args(hints[f.name]))
        yield f.name, next((inner for inner in kinds if isinstance(inner, type) and is_dataclass(inner)), None)


def one_line(box: str) -> str:
    """Returns the parser's error, which it prints in a box of several lines and sections, on one line."""
    sections: list[list[str]] = [[]]
    for line in box.splitlines():
        if re.search("──|-----", line):
            sections.append([])
        else:
            sections[-1].append(line[2:].rstrip(" │"))
    title = "│" not in box  # a terminal of ASCII gets it as a section of its own, others in the box's first line
    first = [lines for lines in sections if any(lines)][title]
    # options stand four columns to the right, each with its type, and their help eight
    text = " ".join(line.split()[0] if line[:4] == "    " else line.strip() for line in first if line[:8].strip())
    for pattern, ours in SENTENCES.items():
        text = re.sub(f"^{pattern}", ours, text)
    for word, meaning in KINDS.items():
        text = re.sub(rf"\b{word}\b", meaning, text)
    return text


def join_help(kind: Any) -> None:
    """Gives each field of a dataclass, and of those within it, its docstring as help, joined to one paragraph.

    The parser itself would take a docstring of several lines for several paragraphs.
    """
    for _, inner in nested(kind):
        if inner is not None:
            join_help(inner)
    for base in filter(is_dataclass, kind.__mro__):
        for name, text in docstrings(base).items():
            own = base.__dataclass_fields__[name]
            own.metadata = MappingProxyType({**own.metadata, "help": " ".join(text.split())})


def joined(text: str) -> str:
    """Returns the text with each paragraph on one line."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


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
