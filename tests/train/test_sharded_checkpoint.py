"""Sharded checkpoints: files written by several ranks, each its boxes, have the bytes of a single rank's file."""

import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open

from retentive.checkpoint.weights import checksum
from retentive.files import load_tensors, save_tensors
from retentive.train.parallel import checkpoint as sharded
from retentive.train.parallel.checkpoint import UNSEALED, Shard

WHOLE = {
    "rows": torch.arange(35.0).view(7, 5),
    "columns": torch.arange(48.0).view(4, 6, 2),
    "é": torch.tensor(3.0),
    "narrow": torch.arange(6.0).bfloat16(),
    "wide": torch.arange(3.0, dtype=torch.float64),
    "none": torch.empty(0, 3),
}


def boxes(rank: int, size: int) -> dict[str, Shard]:
    """Shards of one of several processes: rows, columns, or a whole tensor that another writes."""
    found = {}
    for name, x in WHOLE.items():
        if name in ("rows", "columns"):
            axis = int(name == "columns")
            parts = x.chunk(size, axis)
            before = sum(part.shape[axis] for part in parts[:rank])
            own = parts[rank] if rank < len(parts) else x.narrow(axis, 0, 0)
            start = (before, 0) if name == "rows" else (0, before, 0)
            found[name] = Shard(own, tuple(x.shape), start)
        else:
            found[name] = Shard(x, tuple(x.shape), (0,) * x.ndim, writes=rank == size - 1)
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_many_write_the_file_of_one(size, tmp_path):
    about = {"weights": "averages", "a": "b"}
    save_tensors(tmp_path / "one", WHOLE, about)
    sharded.begin(tmp_path / "many", boxes(0, size), about)
    for rank in reversed(range(size)):
        sharded.write(tmp_path / "many", {name: box.copied() for name, box in boxes(rank, size).items()}, about)
    assert (tmp_path / "many").read_bytes() == (tmp_path / "one").read_bytes()
    assert load_tensors(tmp_path / "many")[1] == {"format": "pt", **about}
    with safe_open(tmp_path / "many", framework="pt") as file:
        for rank in range(size + 1):  # another number of ranks reads it
            for name, box in boxes(rank, size + 1).items():
                found = sharded.read(file, name, box)
                assert torch.equal(found, box.own) and found.dtype == box.own.dtype
        with pytest.raises(SafetensorError, match="other"):
            sharded.read(file, "other", Shard(WHOLE["rows"], (7, 5), (0, 0)))
        with pytest.raises(ValueError, match=r"rows is \[7, 5\], expected \[7, 6\]"):
            sharded.read(file, "rows", Shard(torch.empty(7, 6), (7, 6), (0, 0)))


def test_writes_that_the_system_cuts_short_are_gone_on_with(tmp_path, monkeypatch):
    """A call of the system writes 2 GB at most."""

    class Slow:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, data):
            return self.file.write(data[:7])

    save_tensors(tmp_path / "one", WHOLE)
    sharded.begin(tmp_path / "many", boxes(0, 1), {})
    real = type(tmp_path).open
    monkeypatch.setattr(type(tmp_path), "open", lambda path, *args, **how: Slow(real(path, *args, **how)))
    sharded.write(tmp_path / "many", boxes(0, 1), {})
    monkeypatch.undo()
    assert (tmp_path / "many").read_bytes() == (tmp_path / "one").read_bytes()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_is_an_error_and_no_file_of_zeros():
    with pytest.raises(OSError, match="No space left"):
        sharded.write(Path("/dev/full"), boxes(0, 1), {})


def test_weights_of_a_run_carry_their_checksum(run):
    """Initial weights and every checkpoint have one: `load` refuses a flipped bit, see tests/checkpoint."""
    folder = run("a", steps=4, save_every=2, ema=0.9)
    for file in (folder / "model.safetensors", *folder.glob("checkpoints/*/model.safetensors")):
        tensors, about = load_tensors(file)
        assert about["crc32"] == checksum(tensors) != UNSEALED["crc32"]
