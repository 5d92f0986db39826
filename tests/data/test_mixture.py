"""Mixtures: each folder's rows come as often as its weight says, in their own order, sliced by rank."""

from collections import Counter

import numpy as np
import pytest
import torch

from retentive.data.loader import Batch
from retentive.data.mixture import BLOCK, MixedBatches, Mixture, open_packed
from retentive.data.pack import pack
from retentive.data.packed import Packed
from retentive.data.sources import Document
from retentive.data.tokenizer import ByteTokenizer, train_bpe

T = 8
LETTERS = {"low": "abcdefghij", "high": "ABCDEFGHIJ", "digits": "0123456789"}
SIZES = {"low": 40, "high": 15, "digits": 5}
"""Documents per folder; each folder has its own letters, so that rows reveal their origin."""


def packed_from(folder, letters: str, count: int) -> Packed:
    texts = ["".join(letters[(n + i * i) % 10] for i in range(20)) for n in range(count)]
    documents = [Document(str(n), text) for n, text in enumerate(texts)]
    pack(folder, ByteTokenizer(), documents, documents[:2])
    return Packed(folder)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, Packed]:
    root = tmp_path_factory.mktemp("mixed")
    return {name: packed_from(root / name, letters, SIZES[name]) for name, letters in LETTERS.items()}


@pytest.fixture(scope="module")
def mixture(parts) -> Mixture:
    return Mixture(list(parts.values()), [5, 3, 2])


def sources(batch: Batch) -> list[str]:
    """Returns the folder that each row of a batch comes from."""
    found = []
    for row in batch.ids.reshape(-1, T).tolist():
        text = {chr(id) for id in row if id < 256}
        found += [name for name, letters in LETTERS.items() if text <= set(letters) and text]
    return found


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True) if x is not None)


def test_every_block_of_rows_has_the_shares_exactly(mixture):
    """Each folder's rows in a block are the next ones of that folder, in order."""
    batches = mixture.batches(batch=10, length=T, seed=4)
    for block in (0, 1, 7):
        parts, numbers = batches.places(block * BLOCK + np.arange(BLOCK))
        for part, share in enumerate((0.5, 0.3, 0.2)):
            count = round(share * BLOCK)
            assert numbers[parts == part].tolist() == list(range(block * count, (block + 1) * count))
        # rows of a folder neither cluster nor form a pattern: of ten consecutive rows 5 +- 1.6 are of the first folder
        counts = (parts.reshape(-1, 10) == 0).sum(1)
        assert 1.3 < counts.std() < 1.9
    first, second = (batches.places(np.arange(BLOCK) + at)[0] for at in (0, BLOCK))
    assert (first != second).mean() > 0.5, "another order in the next block"


def test_shares_that_do_not_divide_a_block():
    class Part:
        mode, length = "reset", T

    batches = MixedBatches([Part()] * 3, [1 / 3] * 3, batch=1)  # the parts are not read
    parts, numbers = batches.places(np.arange(2 * BLOCK))
    assert Counter(parts.tolist()) == {0: 6666, 1: 6668, 2: 6666}
    assert all(numbers[parts == part].tolist() == list(range((parts == part).sum())) for part in range(3))


@pytest.mark.parametrize("mode", ["reset", "packed", "whole"])
def test_rows_are_those_of_the_folders_in_their_own_order(parts, mixture, mode):
    """The rows read of one folder equal those read of that folder alone, row by row."""
    options = dict(mode=mode, length=T, seed=3)
    batches = mixture.batches(batch=6, **options)
    alone = [part.batches(batch=1, **options) for part in parts.values()]
    for step in (0, 1, 50, 3000):
        batch, (which, numbers) = batches[step], batches.places(step * 6 + np.arange(6))
        rows = [alone[part][int(number)] for part, number in zip(which, numbers, strict=True)]
        for name in ("ids", "targets"):
            assert torch.equal(getattr(batch, name).reshape(6, T), torch.cat([getattr(r, name) for r in rows]))
        if mode == "packed":
            assert batch.cu_seqlens is None
        else:
            starts = [int(c) + n * T for n, row in enumerate(rows) for c in row.cu_seqlens[:-1]]
            assert batch.cu_seqlens.tolist() == [*starts, 6 * T]


def test_rows_come_as_often_as_the_weights_say(mixture):
    batches = mixture.batches(batch=10, length=T, seed=1)
    found = Counter(name for step in range(BLOCK // 10) for name in sources(batches[step]))
    assert found == {"low": 5000, "high": 3000, "digits": 2000}


def test_ranks_slice_one_global_batch_and_a_batch_depends_on_seed_and_step_only(mixture):
    options = dict(batch=8, length=T)
    batches = mixture.batches(**options, seed=2)
    for world in (2, 4):
        ranks = [mixture.batches(**options, seed=2, rank=rank, world=world) for rank in range(world)]
        for step in (0, 5, BLOCK // 8):
            joined = torch.cat([rank[step].ids.reshape(-1, T) for rank in ranks])
            assert torch.equal(joined, batches[step].ids.reshape(-1, T))
    again, other = (mixture.batches(**options, seed=seed) for seed in (2, 3))
    assert all(same(again[step], batches[step]) for step in (9, 3, 0)) and not same(other[0], batches[0])


def test_the_order_never_changes(mixture):
    """Runs resumed with a later version must see the same data."""
    parts, numbers = mixture.batches(batch=1, length=T, seed=1234).places(np.arange(8))
    assert (parts.tolist(), numbers.tolist()) == PLACES


PLACES = ([1, 0, 2, 1, 2, 2, 0, 0], [0, 0, 0, 1, 1, 2, 1, 2])


def test_weights_are_normalised_and_by_default_the_tokens(parts):
    two = list(parts.values())[:2]
    assert Mixture(two, [30, 10]).shares == {"low": 0.75, "high": 0.25}
    assert Mixture(two).shares == pytest.approx({"low": 40 / 55, "high": 15 / 55})
    assert Mixture(two, [3, 1]).fingerprint == Mixture(two, [1, 3]).fingerprint != Mixture(two[::-1]).fingerprint
    assert Mixture(two).meta.splits["train"].tokens == 55 * 21 and not Mixture(two).meta.chats
    assert isinstance(open_packed([two[0].path]), Packed) and isinstance(
        open_packed([part.path for part in two]), Mixture
    )


def test_folders_of_one_name_are_told_apart_by_their_paths(tmp_path):
    folders = [tmp_path / name / "packed" for name in "ab"]
    for folder, letters in zip(folders, LETTERS.values(), strict=False):
        packed_from(folder, letters, 4)
    assert list(Mixture([Packed(folder) for folder in folders]).parts) == list(map(str, folders))


def test_what_cannot_be_mixed_is_refused(parts, tmp_path, refuses):
    low, high, _ = parts.values()
    tokenizer = train_bpe(["some text of another kind"] * 9, 260)
    pack(tmp_path / "bpe", tokenizer, [Document("0", "some text of another kind")], [])
    with refuses(
        f"{tmp_path / 'bpe'} was packed with another tokenizer than {low.path}: pack it again "
        f"(`retentive data` with `tokenizer='{low.path}'`)"
    ):
        Mixture([low, Packed(tmp_path / "bpe")])
    with refuses("3 weights for 2 folders of data"):
        Mixture([low, high], [1, 2, 3])
    with refuses("1 weight for 1 folder of data"):
        open_packed([low.path], [1.0])
    with refuses("`data` is empty"):
        open_packed([])
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with refuses("weights of data must be above 0, got 1, "):
            Mixture([low, high], [1.0, bad])
    with refuses("is given twice: give it more weight instead"):
        Mixture([low, high, low])
    with refuses("a weight of data is below a 10,000th of their sum"):
        Mixture([low, high], [1.0, 1e-6]).batches(batch=1, length=T)
    with refuses("`mode='carry'` reads one stream"):
        Mixture([low, high]).batches(batch=1, length=T, mode="carry")
    with refuses("batch 3, rank 0, world 2: expected a multiple of world"):
        Mixture([low, high]).batches(batch=3, length=T, world=2)
    with pytest.raises(IndexError, match="step is -1"):
        Mixture([low, high]).batches(batch=1, length=T)[-1]
