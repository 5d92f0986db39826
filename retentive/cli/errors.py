"""Errors as the command line says them: one line on stderr, exit code 2, options as they are typed."""

import ast
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any

PACKAGE = Path(__file__).parents[1]
OPTION = re.compile(r"`([a-z][a-z0-9_]*)(?:=([^`]*))?`")
"""An option in a message of the library (`retentive.options`)."""
NAMES = {
    "convert": {"adapter": "--merge"},
    "data": {"sources": "SOURCES"},
    "eval": {"model": "RUN"},
    "memory": {"sources": "FILES"},
    "sft": {"init": "RUN"},
}
"""Fields that a verb takes under another name or by their place: verb -> field -> name in the verb's help."""


def flags(text: str, verb: str = "") -> str:
    """The text with its options as they are typed: --batch for `batch`, --mode carry for `mode='carry'`."""

    def flag(found: re.Match) -> str:
        name, value = found.groups()
        typed = NAMES.get(verb, {}).get(name, "--" + name.replace("_", "-"))
        if value is None:
            return typed
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # a name that stands for any value
            return f"{typed} {value}"
        if isinstance(value, bool):
            return typed if value else typed.replace("--", "--no-", 1)
        return f"{typed} {as_typed(value)}"

    return OPTION.sub(flag, text)


def as_typed(value: Any) -> str:
    """The value of an option as it is typed."""
    if isinstance(value, Mapping):
        return " ".join(f"{name}={x}" for name, x in value.items()) or "none"
    return (" ".join(map(str, value)) or "none") if isinstance(value, tuple | list) else str(value)


def described(error: BaseException, verb: str = "") -> str:
    """The error's message on one line; options become flags if this package raised it, not another library."""
    said = " ".join(str(error).split()) or "there is not enough memory"
    frames = [frame.f_code.co_filename for frame, _ in walk_tb(error.__traceback__)]
    if frames and Path(frames[-1]).is_relative_to(PACKAGE):
        said = flags(said, verb)
    # a file's name may hold what a terminal obeys
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in said)


@contextmanager
def one_line(verb: str = "") -> Iterator[None]:
    """An error that the user can fix ends the process in this block, in one line (RETENTIVE_DEBUG=1: a traceback)."""
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(file=sys.stderr)  # after the terminal's ^C
        sys.exit(130)  # 128 + SIGINT, as shells have it
    except BrokenPipeError:  # the reader has had enough, as `| head`; stdout is flushed once more at exit, to nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ArithmeticError, ImportError, MemoryError) as error:
        if os.environ.get("RETENTIVE_DEBUG"):
            raise
        rank = os.environ.get("RANK", "0")  # of several processes that train together
        who = "retentive:" if rank == "0" else f"retentive: rank {rank}:"
        print(who, described(error, verb), file=sys.stderr)
        sys.exit(2)  # what argument parsers use for bad input
