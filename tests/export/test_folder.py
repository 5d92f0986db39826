"""What holds for exports of every kind: nothing is half-written."""

import shutil
from collections import namedtuple

import pytest

from retentive.checkpoint import save_model
from retentive.data.tokenizer import ByteTokenizer
from retentive.export.folder import FILES, export
from tests.export.variants import peaked


@pytest.mark.parametrize("to", FILES)
def test_a_disk_without_room_is_told_before_anything_is_written(to, tmp_path, monkeypatch):
    save_model(tmp_path / "model", peaked(), ByteTokenizer())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(OSError, match=r"0 MB are free at .*, the export takes 0 MB at least"):
        export(str(tmp_path / "model"), to, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == []
