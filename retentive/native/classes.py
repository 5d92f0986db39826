"""Character classes for splitting words: `python -m retentive.native.classes` writes `c/classes.h`.

The classes are not taken from Unicode tables. They are measured: the pre-tokenizers ByteLevel (GPT-2's words) and
Digits of the `tokenizers` package split every character. Their versions know different versions of Unicode.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from retentive.files import write_text
from retentive.native.library import FOLDER

NAMES = ("SPACE", "LETTER", "DIGIT", "OTHER", "NEW_DIGIT")
"""Class names. NEW_DIGIT is a digit that Digits splits off, but GPT-2's pattern, with an older Unicode, does not."""
SPACE, LETTER, DIGIT, OTHER, NEW_DIGIT = range(5)
BEYOND = 0x110000
PART = 1 << 10
"""Characters split at once: the time for longer texts grows faster than their length."""
PAGE = """/* The classes of characters where words are split: `python -m retentive.native.classes` has written them, as
tokenizers {version} has them. Each entry is the first character of a run << 3 | the class of all up to the next. */

#pragma once
#include <stdint.h>

typedef enum {{ {names} }} Class;

static const uint32_t runs_of_classes[] = {{
{lines}
}};
"""


class Run(NamedTuple):
    """Code points from `first` up to the next run's, all of one class."""

    first: int
    kind: int


def runs() -> list[Run]:
    """Classes of all code points in the installed tokenizers. Surrogates, which no text holds, are OTHER."""
    from tokenizers import pre_tokenizers

    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    found = list[Run]()
    for first in _pieces(words, digits):
        kind = _class(words, digits, chr(first)) if not 0xD800 <= first < 0xE000 else OTHER
        if not found or kind != found[-1].kind:
            found.append(Run(first, kind))
    return found


def _pieces(*splitters: Any) -> Iterator[int]:
    """Yield the first character of each piece of the text of all characters, in order: a piece has one class."""
    for begin in range(0, BEYOND, PART):
        if 0xD800 <= begin < 0xE000:
            yield begin
            continue
        text = "".join(map(chr, range(begin, begin + PART)))
        starts = {
            begin,
            *(range(128) if begin == 0 else ()),
        }  # each ASCII character by itself: a space is joined to the next character
        for splitter in splitters:
            starts.update(begin + start for _, (start, _) in splitter.pre_tokenize_str(text))
        yield from sorted(starts)


def _class(words: Any, digits: Any, character: str) -> int:
    """Class of a character: it stays in one word with other characters of its class."""
    for kind, like in ((LETTER, "x"), (DIGIT, "1"), (OTHER, "!")):
        if len(words.pre_tokenize_str(like + character + like)) == 1:
            cut = len(digits.pre_tokenize_str("x" + character)) == 2
            return NEW_DIGIT if kind == OTHER and cut else kind
    return SPACE


def header() -> str:
    """Text of `c/classes.h`."""
    import tokenizers

    entries = [f"{run.first << 3 | run.kind:#x}," for run in runs()]
    lines = [" ".join(entries[i : i + 12]) for i in range(0, len(entries), 12)]
    return PAGE.format(
        version=tokenizers.__version__, names=", ".join(NAMES), lines="\n".join(f"    {x}" for x in lines)
    )


if __name__ == "__main__":
    write_text(FOLDER / "classes.h", header())
