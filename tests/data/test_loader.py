"""Batches are a pure function of (seed, step), independent of the number of ranks, and keep documents apart."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retentive.data.loader import Batch, permute
from retentive.data.pack import pack
from retentive.data.packed import Packed
from retentive.data.sources import Document
from retentive.data.tokenizer import ByteTokenizer

EOS = 256
# Lengths from one byte to several windows; each document has its own bytes, so that mix-ups show.
LENGTHS = [1, 40, 7, 3, 90, 1, 2, 15, 60, 5, 5, 33, 8, 120, 4, 11, 2, 27]
TEXTS = ["".join(chr(32 + (17 * n + i * (n % 5 + 1)) % 90) for i in range(length)) for n, length in enumerate(LENGTHS)]
VALID = ["é猫🙂" * 5, "b", "the last held out text"]
TOKENS = sum(LENGTHS) + len(LENGTHS)
T = 8


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Packed:
    out = tmp_path_factory.mktemp("data") / "packed"
    train = [Document(str(n), text) for n, text in enumerate(TEXTS)]
    valid = [Document(str(n), text) for n, text in enumerate(VALID)]
    meta = pack(out, ByteTokenizer(), train, valid, shard_tokens=100)
    assert len(meta.splits["train"].shards) > 2, "windows must pass from shard to shard"
    return Packed(out)


def stream_of(texts: list[str]) -> list[int]:
    return [id for text in texts for id in [*text.encode(), EOS]]


STREAM = stream_of(TEXTS)


def expected_targets(tokens: list[int]) -> list[int]:
    """Returns the next token of T+1 tokens each; an end of text is followed by the next document's first token."""
    return tokens[1:]


def sequences(batch: Batch) -> list[list[int]]:
    cu = batch.cu_seqlens.tolist()
    return [batch.ids[0, a:b].tolist() for a, b in pairwise(cu)]


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True) if x is not None)


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**70), epoch=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_permutation_is_a_bijection(n, seed, epoch):
    assert sorted(permute(np.arange(n), n, (seed, epoch)).tolist()) == list(range(n))


def test_permutation_mixes_and_depends_on_its_key():
    n = 10_000
    order = permute(np.arange(n), n, (0, 0))
    for other in ((0, 1), (1, 0)):
        assert (permute(np.arange(n), n, other) == order).mean() < 0.01
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.05, "about 5 standard deviations of a random order"
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert permute(np.array([77]), n, (0, 0))[0] == order[77], "one index alone goes where it goes among others"


def test_the_order_never_changes():
    """Runs resumed with a later version must see the same data."""
    assert permute(np.arange(10), 10, (1234, 0)).tolist() == [0, 6, 4, 5, 8, 7, 2, 3, 1, 9]


def test_packed_covers_every_window_once_an_epoch(packed):
    batches = packed.batches(mode="packed", batch=4, length=T, seed=3)
    windows = (TOKENS - 1) // T
    assert batches.tokens == TOKENS and batches.steps_per_epoch == -(-windows // 4)
    rows = [row for step in range(batches.steps_per_epoch * 2) for row in zip(*batches[step][:2], strict=True)]
    assert batches[0].ids.shape == (4, T) and batches[0].ids.dtype == torch.int64
    assert batches[0].cu_seqlens is None and batches[0].carry is None
    found = [[*ids.tolist(), int(targets[-1])] for ids, targets in rows]
    assert all(ids[1:].tolist() == targets[:-1].tolist() for ids, targets in rows)
    expected = sorted(STREAM[j * T : j * T + T + 1] for j in range(windows))
    first, second = found[:windows], found[windows : 2 * windows]
    assert sorted(first) == expected and sorted(second) == expected
    assert first != second and first != [STREAM[j * T : j * T + T + 1] for j in range(windows)]


def test_reset_is_packed_with_documents_apart(packed):
    packed_rows = packed.batches(mode="packed", batch=4, length=T, seed=3)
    reset = packed.batches(mode="reset", batch=4, length=T, seed=3)
    for step in range(reset.steps_per_epoch):
        batch, rows = reset[step], packed_rows[step]
        assert batch.ids.shape == batch.targets.shape == (1, 4 * T) and batch.carry is None
        assert torch.equal(batch.ids.view(4, T), rows.ids)
        full = [[*row.tolist(), int(last)] for row, last in zip(rows.ids, rows.targets[:, -1], strict=True)]
        assert batch.targets[0].tolist() == [target for row in full for target in expected_targets(row)]
        starts = {0, T, 2 * T, 3 * T} | {i for i, id in enumerate(batch.ids[0].tolist()) if id == EOS}
        assert batch.cu_seqlens.tolist() == sorted(starts | {4 * T})
        assert batch.cu_seqlens.dtype == torch.int32
        assert all(EOS not in sequence[1:] for sequence in sequences(batch))


@pytest.mark.parametrize("mode", ["packed", "reset", "carry"])
def test_ranks_slice_one_global_batch(packed, mode):
    options = {"mode": mode, "batch": 4, "length": T, "seed": 1}
    whole = packed.batches(**options)
    for world in (2, 4):
        ranks = [packed.batches(**options, rank=rank, world=world) for rank in range(world)]
        assert ranks[0].steps_per_epoch == whole.steps_per_epoch
        for step in range(2 * whole.steps_per_epoch):
            parts, all_rows = [rank[step] for rank in ranks], whole[step]
            for name in ("ids", "targets"):
                joined = torch.cat([getattr(part, name).reshape(-1, T) for part in parts])
                assert torch.equal(joined, getattr(all_rows, name).reshape(-1, T))
            if mode != "packed":
                assert [s for part in parts for s in sequences(part)] == sequences(all_rows)
            if mode == "carry":
                joined = [flag for part in parts for flag in part.carry.continues.tolist()]
                assert joined == all_rows.carry.continues.tolist()


@pytest.mark.parametrize("mode", ["packed", "reset", "carry"])
def test_a_batch_depends_on_seed_and_step_only(packed, mode):
    options = {"mode": mode, "batch": 3, "length": T}
    batches = packed.batches(**options, seed=5)
    steps = [0, 1, 2, batches.steps_per_epoch, 3 * batches.steps_per_epoch + 1]
    before = [batches[step] for step in steps]
    again = packed.batches(**options, seed=5)
    assert all(same(again[step], batch) for step, batch in reversed(list(zip(steps, before, strict=True))))
    assert not same(before[0], packed.batches(**options, seed=6)[0])
    assert not same(before[0], before[3]), "another order in the next epoch"


@pytest.mark.parametrize("rows, length", [(1, 8), (3, 8), (4, 13), (2, 1), (5, 50)])
def test_carry_streams_every_document_through_its_row(packed, rows, length):
    batches = packed.batches(mode="carry", batch=rows, length=length, seed=2)
    steps = batches.steps_per_epoch
    assert steps == (TOKENS - 1) // rows // length
    for epoch in range(2):
        streamed: list[list[list[int]]] = [[] for _ in range(rows)]  # each row's sequences, joined where they continue
        for step in range(epoch * steps, (epoch + 1) * steps):
            batch = batches[step]
            parts = sequences(batch)
            first, last, continues = (each.tolist() for each in batch.carry)
            assert first[0] == 0 and last[-1] == len(parts) - 1 and [a + 1 for a in last[:-1]] == first[1:]
            for row in range(rows):
                own = parts[first[row] : last[row] + 1]
                assert sum(map(len, own)) == length
                if continues[row]:
                    assert step % steps, "an epoch starts afresh"
                    assert own[0][0] != EOS
                    streamed[row][-1] += own.pop(0)
                elif step % steps:
                    assert own[0][0] == EOS, "only after a document's end may a row start afresh"
                streamed[row] += own
        texts = [stream_of([text]) for text in TEXTS]
        inside = [[EOS, *text[:-1]] for text in texts]  # a sequence: the end of the text before, then the document
        assert all(sequence in inside for row in streamed for sequence in row[1:-1]), "whole documents, no others"
        joined = [id for row in streamed for sequence in row for id in sequence]
        assert len(joined) == rows * steps * length and TOKENS - len(joined) <= rows * length
        *whole, rest = split_at_ends(joined)  # each row begins where the one before ends
        assert all(whole.count(part) <= texts.count(part) for part in whole), "documents of the text, none twice"
        assert any(text[: len(rest)] == rest for text in texts)


def split_at_ends(ids: list[int]) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for id in ids:
        parts[-1].append(id)
        if id == EOS:
            parts.append([])
    return [part for part in parts if part]


def test_carry_targets_look_across_steps(packed):
    batches = packed.batches(mode="carry", batch=3, length=T, seed=2)
    for step in range(batches.steps_per_epoch - 1):
        ids, targets, after = (
            batches[step].ids.view(3, T),
            batches[step].targets.view(3, T),
            batches[step + 1].ids.view(3, T),
        )
        for row in range(3):
            assert targets[row].tolist() == expected_targets([*ids[row].tolist(), int(after[row, 0])])


def test_what_cannot_work_is_refused(packed):
    for options, message in (
        ({"length": TOKENS}, f"holds {TOKENS} tokens, too few for a window of length {TOKENS}"),
        ({"length": TOKENS // 2, "mode": "carry"}, "too few for 4 rows of length"),
        ({"batch": 3, "world": 2}, "expected a multiple of world"),
        ({"rank": 2, "world": 2}, "a rank below"),
        ({"world": 0}, "batch 4, rank 0, world 0"),
        ({"mode": "shuffle"}, "`mode='shuffle'`: expected"),
        ({"length": 0}, "`length=0`: each must"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            packed.batches(**{"batch": 4, "length": T} | options)
        assert "\n" not in str(caught.value)
    assert packed.batches(batch=1, length=TOKENS - 1)[0].ids.shape == (1, TOKENS - 1)
    with pytest.raises(IndexError, match=r"step is -1"):
        packed.batches(batch=1, length=T)[-1]


def test_to_a_device_goes_all_of_a_batch(packed):
    batch = packed.batches(mode="carry", batch=3, length=T)[1].to(torch.device("meta"))
    tensors = [batch.ids, batch.targets, batch.cu_seqlens, *batch.carry]
    assert all(x.device.type == "meta" for x in tensors) and batch.carry._fields == ("first", "last", "continues")
