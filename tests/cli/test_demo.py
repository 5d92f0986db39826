"""`retentive demo` from end to end, on a part of the library and for a few steps."""

import itertools
import json
import signal

import pytest
import torch

from retentive import machine
from retentive.cli import demo
from retentive.models import PRESETS
from retentive.models.presets import Size
from retentive.train import Interrupted, TrainRun


def test_demo(tmp_path, monkeypatch, capsys):
    everything = list(itertools.islice(demo.library(), 60))
    held = [(d, h) for d, h in demo.library() if d.name == "textwrap.py"]
    part = [(d, False) for d, _ in everything] + [(d, True) for d, _ in held]
    monkeypatch.setattr(demo, "library", lambda: iter(part))
    monkeypatch.setitem(PRESETS, "1m", Size(dict(dim=32, layers=2, heads=2, tie_embeddings=True)))
    monkeypatch.setattr(demo, "CONTEXTS", (64, 128))
    monkeypatch.setattr(machine, "gemm_rate", lambda *_, **__: 1e12)
    monkeypatch.setattr(machine, "numbers", lambda device, *_: torch.ones(64, 4096, device=device))  # not half a GB
    out = tmp_path / "runs" / "demo"
    arguments = ["--out", str(out), "--size", "1m", "--vocab-size", "512", "--minutes", "0.001"]
    demo.main(arguments)

    steps = json.loads((out / "train.json").read_text())["train"]["steps"]
    assert steps == 20, "the least, whatever the time"
    shown = capsys.readouterr().out
    figures = json.loads((out / "held_out.json").read_text())
    assert figures["bytes"] == sum(len(d.text.encode()) for d, h in part if h)
    assert 0 < figures["xz -9"] < figures["order-0 entropy"] < 8 and 0 < figures["this model"] < 8
    rows = json.loads((out / "decode.json").read_text())["rows"]
    assert [row["context"] for row in rows] == [64, 128]
    few, many = (row["models"] for row in rows)
    assert few["retnet"]["state_bytes"] == many["retnet"]["state_bytes"]
    assert few["transformer"]["state_bytes"] < many["transformer"]["state_bytes"]
    assert all(f"{n}. " in shown for n in range(1, 7)) and f"retentive generate {out}" in shown.replace("\n", "")
    assert (out / "decode.png").read_bytes()[:4] == b"\x89PNG"

    assert "20 steps of 4 x 512 tokens fit 0.001 min" in " ".join(shown.split())

    with pytest.raises(FileExistsError, match="--overwrite"):
        demo.main(arguments)


@pytest.mark.parametrize(
    ("minutes", "seconds", "steps"), [(4, 0.5, 428), (4, 60, 20), (1000, 0.01, 20_000)], ids=["usual", "least", "most"]
)
def test_the_steps_fill_the_minutes(minutes, seconds, steps, monkeypatch, tmp_path):
    """With an eighth for what is not a step."""
    monkeypatch.setattr(TrainRun, "seconds_per_step", lambda run: seconds)
    run = demo.planned(demo.DemoCommand(out=tmp_path / "run", minutes=minutes), tmp_path / "data")
    assert run.train.steps == steps and run.train.warmup <= steps


BAD = {
    "minutes": (["--minutes", "-1"], "--minutes must be above 0 and finite, got -1"),
    "no-time": (["--minutes", "0"], "--minutes must be above 0 and finite, got 0"),
    "no-end": (["--minutes", "inf"], "--minutes must be above 0 and finite, got inf"),
    "here": (["--out", "."], "--out . has no name of its own"),
    "out-is-a-file": (["--out", __file__], "is a file: choose a folder"),
    "out-below-a-file": (["--out", f"{__file__}/run"], f"cannot write {__file__}: File exists"),
    "size": (["--size", "zz"], "unknown size 'zz', expected one of 1m"),
    "vocabulary": (["--vocab-size", "100"], "--vocab-size must be at least 257"),
}


@pytest.mark.parametrize("case", BAD)
def test_arguments_are_checked_before_any_work(case, tmp_path, monkeypatch, refuses):
    argv, words = BAD[case]
    monkeypatch.setattr(demo, "library", lambda: pytest.fail("it reads the library already"))
    with refuses(words, Exception):
        demo.main(["--out", str(tmp_path / "run"), *argv])
    assert not list(tmp_path.iterdir())


def test_a_stop_while_it_trains_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def stopped(*_, **__):
        raise Interrupted("stopped at step 5 of 20, saved; go on with --resume", signal.SIGINT)

    monkeypatch.setattr(demo, "prepare", lambda *_: None)
    monkeypatch.setattr(demo, "planned", lambda *_: TrainRun(tmp_path / "run-data", tmp_path / "run"))
    monkeypatch.setattr(TrainRun, "run", stopped)
    with pytest.raises(SystemExit) as stop:
        demo.main(["--out", str(tmp_path / "run")])
    said = "".join(capsys.readouterr().out.split())
    assert stop.value.code == 130
    assert said.endswith(f"retentivetrain--data{tmp_path}/run-data--out{tmp_path}/run--resume")


def test_held_out_modules_are_whole():
    documents = list(demo.library())
    held = {d.name for d, h in documents if h}
    train = {d.name for d, h in documents if not h}
    assert {"json/__init__.py", "json/decoder.py", "argparse.py"} <= held and not held & train
    assert not any("test_json" in name or "test_argparse" in name for name in train)
    assert len(train) > 300, "most of the library is there to learn from"
