"""Prompts from the command line or standard input, and text printed as it comes. Needs no torch."""

import os
import select
import stat
import sys
from collections.abc import Iterator
from itertools import chain


def prompt_text(prompt: str) -> str:
    """Return the prompt, or standard input if it is "-".

    Raises:
        ValueError: the bytes are not UTF-8 text.
    """
    try:
        text = sys.stdin.read() if prompt == "-" else prompt
        text.encode()  # fails for lone surrogates, which Python makes of invalid bytes in arguments
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        where = "standard input" if prompt == "-" else "the prompt"
        raise ValueError(f"{where} is not UTF-8 text ({error.reason} at {error.start})") from None
    return text


def piped() -> str:
    """Return "-", which stands for standard input, if that is a pipe or a file with something in it; else nothing.

    A pipe that nobody has written to yet is left alone, since it may be a parent's that stays open.
    """
    try:
        kind = os.fstat(sys.stdin.fileno()).st_mode
        there = stat.S_ISREG(kind) or (stat.S_ISFIFO(kind) and bool(select.select([sys.stdin], [], [], 0)[0]))
    except (OSError, ValueError):  # closed, replaced by a test, or no pipe for select (Windows)
        return ""
    return "-" if there else ""


def type_out(prompt: str, pieces: Iterator[str]) -> None:
    """Print a prompt and the pieces of text after it, as they come; nothing if an error precedes the first piece."""
    first = next(pieces, "")
    sys.stdout.write(prompt)
    try:
        for piece in chain([first], pieces):
            sys.stdout.write(piece)
            sys.stdout.flush()
    finally:  # so that an error message or the shell's prompt starts a new line
        sys.stdout.write("\n")
