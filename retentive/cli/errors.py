"""Errors on the command line: one line on stderr, exit code 2, options written as flags."""

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
"""Pattern of an option in a message of the library (`retentive.options`)."""
NAMES = {
    "convert": {"adapter": "--merge"},
    "data": {"sources": "SOURCES"},
    "eval": {"model": "RUN"},
    "memory": {"sources": "FILES"},
    "sft": {"init": "RUN"},
}
"""Fields that a verb takes under another name or by position: verb -> field -> name in its help."""
TRAINING = ("train", "sft", "linearize", "compare")
"""Verbs that train."""


def flags(text: str, verb: str = "") -> str:
    """Return the text with its options as flags: --batch for `batch`, --mode carry for `mode='carry'`."""

    def flag(found: re.Match) -> str:
        name, value = found.groups()
        typed = NAMES.get(verb, {}).get(name, "--" + name.replace("_", "-"))
        if value is None:
            return typed
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # a placeholder for a value
            return f"{typed} {value}"
        if isinstance(value, bool):
            return typed if value else typed.replace("--", "--no-", 1)
        return f"{typed} {as_typed(value)}"

    return OPTION.sub(flag, text)


def as_typed(value: Any) -> str:
    """Return the value of an option as it is typed."""
    if isinstance(value, Mapping):
        return " ".join(f"{name}={x}" for name, x in value.items()) or "none"
    return (" ".join(map(str, value)) or "none") if isinstance(value, tuple | list) else str(value)


def described(error: BaseException, verb: str = "") -> str:
    """Return the error's message on one line, its options as flags if this package raised it."""
    said = of_memory(error) or " ".join(str(error).split()) or "there is not enough memory"
    frames = [frame.f_code.co_filename for frame, _ in walk_tb(error.__traceback__)]
    if frames and Path(frames[-1]).is_relative_to(PACKAGE):
        said = flags(said, verb)
    # escape sequences in a file's name must not reach the terminal
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in said)


def of_memory(error: BaseException) -> str | None:
    """Return one line on a lack of memory that torch reports, on a CPU by a RuntimeError; None for other errors."""
    gpu = type(error).__name__ == "OutOfMemoryError"
    if not gpu and not (isinstance(error, RuntimeError) and "can't allocate memory" in str(error)):
        return None
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
    full = f"the memory of the {'GPU' if gpu else 'machine'} is full" + (
        f", {asked[1]} more were wanted" if asked else ""
    )
    return f"{full}: take smaller batches, shorter rows or a smaller model"


@contextmanager
def one_line(verb: str = "") -> Iterator[None]:
    """End the process on an error in this block that the user can fix: one line (RETENTIVE_DEBUG=1: a traceback)."""
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(file=sys.stderr)  # ends the line of the terminal's ^C
        if verb in TRAINING:  # which report by themselves from their first step on
            print("stopped before the first step of this command: nothing was saved yet", file=sys.stderr)
        sys.exit(130)  # 128 + SIGINT, as in shells
    except BrokenPipeError:  # the reader has gone, as `| head`; the flush at exit then goes to the null device
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ArithmeticError, ImportError, MemoryError, RuntimeError) as error:
        if os.environ.get("RETENTIVE_DEBUG") or (isinstance(error, RuntimeError) and not of_memory(error)):
            raise
        rank = os.environ.get("RANK", "0")  # of several processes that train together
        who = "retentive:" if rank == "0" else f"retentive: rank {rank}:"
        print(who, described(error, verb), file=sys.stderr)
        sys.exit(2)  # what argument parsers use for bad input
