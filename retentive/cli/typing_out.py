"""A prompt from the command line or standard input, and text printed as it comes; nothing here needs torch."""

import sys
from collections.abc import Iterator
from itertools import chain


def prompt_text(prompt: str) -> str:
    """The prompt, or standard input where it is "-".

    Raises:
        ValueError: bytes that are no UTF-8 text.
    """
    try:
        text = sys.stdin.read() if prompt == "-" else prompt
        text.encode()  # Python reads bytes that are no UTF-8 in arguments as lone surrogates: they fail here
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        where = "standard input" if prompt == "-" else "the prompt"
        raise ValueError(f"{where} is not UTF-8 text ({error.reason} at {error.start})") from None
    return text


def type_out(prompt: str, pieces: Iterator[str]) -> None:
    """Print a prompt and the pieces of text after it, as they come; nothing if an error comes before the first."""
    first = next(pieces, "")
    sys.stdout.write(prompt)
    try:
        for piece in chain([first], pieces):
            sys.stdout.write(piece)
            sys.stdout.flush()
    finally:  # an error message, or the shell's prompt, begins on a line of its own
        sys.stdout.write("\n")
