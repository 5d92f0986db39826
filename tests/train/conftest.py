"""A small packed text with some order in it, runs on it, and the comparison of two runs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from retentive.data.loader import Batch, Batches
from retentive.data.pack import pack
from retentive.data.packed import Packed
from retentive.data.sources import Document
from retentive.data.tokenizer import ByteTokenizer
from retentive.models import LanguageModel, ModelConfig, build, retnet
from retentive.train import Hooks, TrainConfig, language_modelling, train
from retentive.train.checkpoints import folders
from retentive.train.directory import RunDirectory

NOUNS = [
    "river",
    "stone",
    "garden",
    "letter",
    "window",
    "engine",
    "captain",
    "morning",
    "shadow",
    "violin",
    "café",
    "naïveté",
]
VERBS = ["follows", "remembers", "paints", "forgets", "carries", "answers", "repairs", "crosses"]
ADJECTIVES = ["old", "quiet", "bright", "narrow", "heavy", "distant"]


def story(number: int) -> str:
    """Document `number`: some sentences whose words an integer recurrence picks, the same on every machine."""
    place, sentences = number + 1, []

    def pick(words: list[str]) -> str:
        nonlocal place
        place = (place * 1103515245 + 12345) % 2**31
        return words[(place >> 8) % len(words)]

    for _ in range(3 + number % 5):
        subject, verb, thing = pick(NOUNS), pick(VERBS), pick(NOUNS)
        sentences.append(f"The {pick(ADJECTIVES)} {subject} {verb} the {thing}.")
    return " ".join(sentences) + "\n"


@pytest.fixture(scope="session")
def packed(tmp_path_factory) -> Path:
    """30 stories to train on, 6 held out: 6 kB in bytes."""
    out = tmp_path_factory.mktemp("data") / "packed"
    documents = [Document(str(n), story(n)) for n in range(36)]
    pack(out, ByteTokenizer(), documents[:30], documents[30:])
    return out


@pytest.fixture(autouse=True)
def light(monkeypatch):
    """Use one thread, the fastest for models this small, and skip measuring the machine's speed."""
    monkeypatch.setattr("retentive.train.speed.gemm_rate", lambda device, dtype, **how: 1e12)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


TINY = retnet(dim=32, layers=2, heads=2)


class Acting:
    """Batches with an action before one of them is read."""

    def __init__(self, batches: Batches, model: LanguageModel, at: int, act: Callable[[LanguageModel], None] | None):
        self.batches, self.model, self.at, self.act = batches, model, at, act
        self.length = batches.length

    def __getitem__(self, index: int) -> Batch:
        if self.act and index == self.at:
            self.act(self.model)
        return self.batches[index]


class Runs:
    """`run(name, …)`: trains a tiny model on the stories and gives its run directory, `run.folder(name)`.

    `model` is one, or a config that is built from the seed `init`. `act(model)` is called before batch `at` is read.
    """

    def __init__(self, data: Path, root: Path):
        self.data, self.root = data, root

    def folder(self, name: str) -> Path:
        return self.root / name

    def __call__(
        self,
        name,
        *,
        model=TINY,
        init=0,
        mode="reset",
        at=-1,
        act=None,
        resume=False,
        existing=None,
        evaluate=None,
        **how,
    ):
        torch.manual_seed(init)
        model = build(model) if isinstance(model, ModelConfig) else model
        config = TrainConfig(
            **{"steps": 8, "warmup": 2, "lr": 1e-3, "precision": "fp32", "save_every": 3, "device": "cpu", **how}
        )
        data = Packed(self.data)
        batches = Acting(data.batches(mode=mode, batch=4, length=32, seed=config.seed), model, at, act)
        existing = existing or ("resume" if resume else "refuse")
        directory = RunDirectory(self.folder(name), data.tokenizer, existing=existing)
        return train(model, batches, language_modelling, config, directory, Hooks(evaluate, quiet=True))


@pytest.fixture
def run(packed, tmp_path) -> Runs:
    return Runs(packed, tmp_path)


@pytest.fixture
def metrics():
    """`metrics(run)`: the lines of metrics.jsonl without times and memory."""

    def read(folder: Path) -> list[dict]:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        measured = ("tokens_per_second", "mfu", "memory")
        return [{k: v for k, v in json.loads(line).items() if k not in measured} for line in lines]

    return read


@pytest.fixture
def same_end(metrics, same):
    """`same_end(a, b)`: two runs ended in the same bits: weights, moments, carried state, metrics."""

    def check(a: Path, b: Path) -> None:
        assert metrics(a) == metrics(b)
        assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
        last, other = (folders(run)[-1] for run in (a, b))
        assert last.name == other.name
        assert sorted(f.name for f in last.iterdir()) == sorted(f.name for f in other.iterdir())
        for file in last.glob("*.safetensors"):
            have, want = load_file(file), load_file(other / file.name)
            assert list(have) == list(want) and len(have) > 0
            same(list(have.values()), list(want.values()), 0, file.name)

    return check
