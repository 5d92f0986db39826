"""C splits texts into words as the tokenizers package does: every code point, random texts, and invalid bytes."""

import random
import re
import shutil
import subprocess
from itertools import accumulate
from pathlib import Path

import pytest
import tokenizers
from tokenizers import pre_tokenizers

from retentive.native import classes
from retentive.native.classes import DIGIT, NEW_DIGIT, OTHER
from retentive.native.library import FOLDER, OPS
from retentive.ops.compiler import FLAGS, LINK

HEADER = FOLDER / "classes.h"
SAME = tokenizers.__version__ in HEADER.read_text()
"""True if the tables are from the installed version: other versions know another Unicode."""


@pytest.fixture(scope="module")
def words(once):
    """`words(*arguments, text=b"")`: the lines that words.c prints, as tuples of numbers."""
    if not shutil.which("gcc"):
        pytest.skip("needs gcc")

    def make(file):
        source = str(Path(__file__).with_name("words.c"))
        sanitised = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        command = ["gcc", *FLAGS, "-O1", *sanitised, f"-I{FOLDER}", f"-I{OPS}", "-Wno-unknown-pragmas", source]
        subprocess.run([*command, "-o", str(file), *LINK], check=True)

    program = once("words", make)

    def run(*arguments, text=b""):
        done = subprocess.run([str(program), *arguments], input=text, capture_output=True, check=True)
        return [tuple(map(int, line.split())) for line in done.stdout.splitlines()]

    return run


def of_each(runs):
    """Class of each code point."""
    ends = [first for first, _ in runs[1:]] + [0x110000]
    return [kind for (first, kind), end in zip(runs, ends, strict=True) for _ in range(first, end)]


@pytest.fixture(scope="module")
def known():
    """Classes of all code points in the installed tokenizers, and the digits that only one of its splitters knows."""
    return of_each(classes.runs())


@pytest.mark.parametrize("digits", ["0", "1"])
def test_classes_of_all_code_points(digits, words, known):
    found = of_each(words("runs", digits))
    want = [(DIGIT if digits == "1" else OTHER) if kind == NEW_DIGIT else kind for kind in known]
    assert len(found) == 0x110000
    differ = [(c, *kinds) for c, kinds in enumerate(zip(found, want, strict=True)) if kinds[0] != kinds[1]]
    # another version of Unicode gives classes to what was none of its characters, and takes none away
    assert not differ if SAME else all(OTHER in kinds for _, *kinds in differ)


def test_the_header_is_what_its_program_writes():
    written = [int(x, 16) for x in re.findall(r"\b0x\w+(?=,)", HEADER.read_text())]
    assert written == sorted(set(written)) and written[0] >> 3 == 0
    if SAME:
        assert classes.header() == HEADER.read_text()


@pytest.mark.parametrize("digits", ["0", "1"])
def test_random_texts_are_split_as_there(digits, words, known):
    draw = random.Random(0)
    agreed = (
        known if SAME else [x if x == y else None for x, y in zip(known, of_each(words("runs", digits)), strict=True)]
    )
    kinds = [[c for c, kind in enumerate(agreed) if kind == k and not 0xD800 <= c < 0xE000] for k in range(5)]
    kinds = [members for members in kinds if members]
    parts = ["'s", "'ll", "'t", "' ", " ", "  ", "\n", "\u3000", "\r\n\t", "a", "7", "!"]
    text = "".join(
        draw.choice(parts) if draw.random() < 0.4 else chr(draw.choice(draw.choice(kinds))) for _ in range(20000)
    )
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if digits == "1":
        level = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    ends = [end for _, (_, end) in level.pre_tokenize_str(text)]
    bytes_before = [0, *accumulate(len(c.encode()) for c in text)]
    assert [end for (end,) in words("ends", digits, text=text.encode())] == [bytes_before[end] for end in ends]


def test_bytes_that_are_no_text(words):
    """An invalid byte becomes U+FFFD: one byte long, and never a letter."""
    cases = {
        b"a\xff\xc3\xa9\x80": [0x61, 0xFFFD, 0xE9, 0xFFFD],
        b"\xc0\xaf\xe0\x80\xaf\xf0\x80\x80\xaf": [0xFFFD] * 9,  # overlong encodings
        b"\xed\xa0\x80": [0xFFFD] * 3,  # a surrogate
        b"\xf4\x90\x80\x80\xf8\x88": [0xFFFD] * 6,  # past the last code point
        b"\xf4\x8f\xbf\xbf\xe2\x82\xac": [0x10FFFF, 0x20AC],
        b"\xe2\x82": [0xFFFD] * 2,  # cut short
        b"\xe2a\xf0\x9f\x98": [0xFFFD, 0x61, *[0xFFFD] * 3],
    }
    for text, want in cases.items():
        assert [c for (c,) in words("points", text=text)] == want
    draw = random.Random(1)
    noise = bytes(draw.choice(b"a \xc3\xa9\xe2\x82\xf0\x9f\x98\x80\xff") for _ in range(5000))
    ends = [end for (end,) in words("ends", "1", text=noise)]
    assert ends == sorted(set(ends)) and ends[-1] == len(noise)
