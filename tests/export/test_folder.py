"""Rules for exports of every kind: nothing is half-written."""

import shutil
from collections import namedtuple

import numpy as np
import pytest

from retentive.checkpoint import save_model
from retentive.checkpoint.quantize import quantize
from retentive.data.tokenizer import ByteTokenizer
from retentive.export.folder import FILES, check_room, difference, export
from retentive.models import build, retnet
from tests.export.variants import peaked


@pytest.mark.parametrize("to", FILES)
def test_a_disk_without_room_is_told_before_anything_is_written(to, tmp_path, monkeypatch):
    save_model(tmp_path / "model", peaked(), ByteTokenizer())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(OSError, match=r"0 MB are free at .*, the export takes 0 MB at least"):
        export(str(tmp_path / "model"), to, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == []


@pytest.mark.parametrize("to", ["onnx", "native"])
def test_logits_that_are_no_numbers_are_not_those_of_the_model(to, tmp_path):
    model = peaked()
    model.blocks[0].ffn.down_proj.weight.data[0, 0] = float("nan")
    save_model(tmp_path / "model", model, ByteTokenizer())
    if to == "native" and not shutil.which("gcc"):
        pytest.skip("needs gcc")
    with pytest.raises(ValueError, match="the model's logits are not finite: nothing is written"):
        export(str(tmp_path / "model"), to, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_difference_that_is_no_number_is_seen():
    def wanted(ids):
        return np.ones(9)

    with pytest.raises(ValueError, match="differ from the model's by nan"):
        difference(wanted, lambda ids: np.full(9, np.nan if len(ids) == 1 else 1), 9, 0.1)


def test_a_quantised_model_needs_the_room_of_its_integers(tmp_path, monkeypatch):
    model = quantize(build(retnet(vocab_size=257, dim=64, layers=2, heads=2)), 8)
    bytes_of_integers = sum(p.numel() for p in model.parameters())
    save_model(tmp_path / "model", model, ByteTokenizer())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**9, 10**9, bytes_of_integers))
    check_room(tmp_path / "out", model)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**9, 10**9, bytes_of_integers - 1))
    with pytest.raises(OSError, match=r"choose another folder$"):
        check_room(tmp_path / "out", model)
