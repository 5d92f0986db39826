"""Shares of a prefill chunk: equal but not tiny, all of it given out, and no more pictures than encoders can read."""

import numpy as np
import pytest

from retentive.infer.placeholders import Placeholders
from retentive.infer.requests import Prompt
from retentive.infer.schedule import shared
from retentive.models.encoders import ImageConfig

IMAGE = ImageConfig(token=50, size=8, patch=4, channels=1)  # pictures of four tokens


def prompt(ids, read=0) -> Prompt:
    rows = {"image": np.zeros((ids.count(50), 16), np.uint8)} if 50 in ids else {}
    return Prompt(ids, [], None, Placeholders(ids, rows, {"image": IMAGE}) if rows else None, read)


def taken(prompts, chunk, every=None, least=1) -> list[int]:
    """Tokens that each of the prompts reads; all must be its next ones."""
    parts = dict(shared(prompts, chunk, every, least))
    assert all(p.ids[p.read : p.read + len(part)] == part and part for p, part in parts.items())
    return [len(parts.get(p, [])) for p in prompts]


@pytest.mark.parametrize(
    ("lengths", "chunk", "want"),
    [
        ([100], 12, [12]),
        ([3, 100, 100], 12, [2, 5, 5]),  # what the short one leaves goes to the others
        ([100, 3, 100], 12, [5, 2, 5]),
        ([100] * 4, 2, [1, 1, 0, 0]),  # no more prompts than tokens
        ([1, 9], 12, [0, 8]),  # the last token is decoded, not read
    ],
)
def test_text_is_read_in_equal_shares(lengths, chunk, want):
    assert taken([prompt([7] * n) for n in lengths], chunk) == want


@pytest.mark.parametrize(
    ("lengths", "want"),
    [
        ([100] * 5, [4, 4, 4, 0, 0]),
        ([100, 100, 100, 30, 20], [4, 0, 0, 4, 4]),  # the oldest, and those with the fewest tokens
        ([100] * 3 + [3] * 5, [4, 0, 0, 2, 2, 2, 2, 0]),  # short ones are read whole
        ([2, 100, 100], [1, 5, 6]),
    ],
)
def test_parts_are_not_too_small(lengths, want):
    assert taken([prompt([7] * n) for n in lengths], 12, least=4) == want


def test_a_long_prompt_waits_neither_for_short_ones_nor_they_for_it():
    long, began = prompt([7] * 1000), 0
    while long.left:
        short = [prompt([7] * 9) for _ in range(40)]  # more come in every step than it can read
        parts = dict(shared([long, *short], 64, None, 8))
        assert len(parts) > 6
        long.read, began = long.read + len(parts[long]), began + 1
    assert began <= 1000 / 8


def test_parts_end_where_states_are_cached():
    prompts = [prompt([7] * 100, read=5), prompt([7] * 100)]
    assert taken(prompts, 16, every=8) == [3, 8]
    looking = prompt([1, 2, *[50] * 4, *[7] * 20])
    assert taken([looking], 16, every=8) == [6]  # after the picture, about which others may ask something else
    looking.read = 6
    assert taken([looking], 16, every=8) == [2]


def test_encoders_have_room_for_a_chunk_and_what_they_leave_goes_to_others():
    looking, text = [1, *[50] * 4, 5, 6], [7] * 100
    assert taken([prompt(looking) for _ in range(3)], 6) == [2, 3, 1]  # the third picture has no room in this step
    assert taken([prompt(looking), prompt(looking), prompt(text)], 4) == [1, 1, 2]
    assert taken([prompt([*[50] * 4, 6]), prompt([*[50] * 4, 6]), prompt(text)], 4) == [2, 0, 2]
    assert taken([prompt([*[50] * 8, 6]), prompt(text)], 2) == [1, 1]  # one picture, though it is larger than a chunk
