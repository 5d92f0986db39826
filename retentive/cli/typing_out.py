"""Prompts from the command line or standard input, and text printed as it comes. Needs no torch."""

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
