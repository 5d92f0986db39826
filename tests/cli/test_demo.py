"""`retentive demo` from end to end, on a part of the library and for a few steps."""

import itertools
import json

import pytest

from retentive.bench import memory
from retentive.cli import demo


def test_demo(tmp_path, monkeypatch, capsys):
    everything = list(itertools.islice(demo.library(), 60))
    held = [(d, h) for d, h in demo.library() if d.name == "textwrap.py"]
    part = [(d, False) for d, _ in everything] + [(d, True) for d, _ in held]
    monkeypatch.setattr(demo, "library", lambda: iter(part))
    monkeypatch.setattr(demo, "steps_for", lambda *_: 6)
    real = memory.of_models
    monkeypatch.setattr(memory, "of_models", lambda models: real(models, contexts=(64, 128), steps=4))
    out = tmp_path / "runs" / "demo"
    demo.main(["--out", str(out), "--size", "1m", "--vocab-size", "512"])

    shown = capsys.readouterr().out
    figures = json.loads((out / "held_out.json").read_text())
    assert figures["bytes"] == sum(len(d.text.encode()) for d, h in part if h)
    assert 0 < figures["xz -9"] < figures["order-0 entropy"] < 8 and 0 < figures["this model"] < 8
    rows = json.loads((out / "memory.json").read_text())["rows"]
    assert [row["context"] for row in rows] == [64, 128]
    assert rows[0]["RetNet"]["bytes"] == rows[1]["RetNet"]["bytes"]
    assert rows[0]["Transformer twin"]["bytes"] < rows[1]["Transformer twin"]["bytes"]
    assert all(f"{n}. " in shown for n in range(1, 7)) and f"retentive generate {out}" in shown.replace("\n", "")
    assert (out / "memory.png").read_bytes()[:4] == b"\x89PNG"

    with pytest.raises(FileExistsError, match="--overwrite"):
        demo.main(["--out", str(out)])


def test_held_out_modules_are_whole():
    documents = list(demo.library())
    held = {d.name for d, h in documents if h}
    train = {d.name for d, h in documents if not h}
    assert {"json/__init__.py", "json/decoder.py", "argparse.py"} <= held and not held & train
    assert not any("test_json" in name or "test_argparse" in name for name in train)
    assert len(train) > 300, "most of the library is there to learn from"
