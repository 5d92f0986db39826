"""A corpus, its packed folder and a trained run, all tiny; a folder of copies for tests that wreck things."""

import shutil
from pathlib import Path

import pytest
import torch

from retentive.cli import main

TINY = ["--size", "1m", "--model", "torchscale", "--set", "dim=32", "layers=2", "heads=2"]
TINY += ["--batch", "2", "--length", "32"]
BRIEF = ["--steps", "4", "--warmup", "2", "--save-every", "2", "--precision", "fp32", "--device", "cpu"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The fastest for models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """corpus/ of six stories, data/ packed as bytes, run/ of four steps: what the commands themselves make."""
    root = tmp_path_factory.mktemp("made")
    (root / "corpus").mkdir()
    for n in range(6):
        text = "".join(f"The café number {n} has {m} chairs and a view of the river.\n" for m in range(12))
        (root / "corpus" / f"{n}.txt").write_text(text, encoding="utf-8")
    main(["data", str(root / "corpus"), "--out", str(root / "data"), "--tokenizer", "bytes"])
    main(["train", "--data", str(root / "data"), "--out", str(root / "run"), *TINY, *BRIEF, "--sample-every", "2"])
    return root


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> Path:
    """The working directory: a copy of all that is made."""
    shutil.copytree(made, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture
def train():
    """Arguments of `train` on the packed data: `train("new", "--steps", "2")`."""
    return lambda out, *more: ["train", "--data", "data", "--out", out, *TINY, *BRIEF, "--sample-every", "0", *more]
