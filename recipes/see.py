r"""Handwritten digits, from an .npz of pictures and labels (x_train, y_train, x_test, y_test: MNIST as in Keras).

    python recipes/see.py mnist.npz digits
    retentive data digits/train.jsonl --valid digits/valid.jsonl --chats --vocab-size 320 \
        --image size=28 patch=14 channels=1 --out data/seen
    retentive train --recipe recipes/see.py                 (the twin: --model transformer --out runs/see-twin)
    retentive eval runs/see --tasks answers:test,answers:before,answers:around,answers:shuffled --data digits \
        --max-tokens 4                                      (and answers:row8-1 … answers:row16-16)
    retentive generate runs/see --image "digits/test.npy[0]" --prompt "Which digit?"

The pictures of a split are one array (train.npy, test.npy), and the first ten of the test are files as well.

A picture is four tokens. Half of the training examples are single pictures followed by the question. The others move
pictures by up to two pixels, and put the question before, or before and after, or show several numbered pictures with
questions about some of them.

Tests: all pictures (test); a thousand with the question before and around; with another example's picture (shuffled,
where chance is a tenth); the k-th of eight and of sixteen pictures (row8-1 … row16-16), to see what the state keeps.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from retentive.train import TrainConfig, TrainRun

MOST, TURNS, ASKED = 16, 4, 1000
"""Maximum pictures in a training row, and questions about it; number of questions in each test but the first."""
FILES = 10
"""Number of pictures that are files as well, to show them to a model by hand."""
QUESTION = "Which digit?"
Turns = list[tuple[list[Any], int]]
"""Turns of a conversation, each (content, answer)."""


def recipe() -> TrainRun:
    return TrainRun(
        data=Path("data/seen"),
        out=Path("runs/see"),
        size="1m",
        set={"dropout": 0.1, "image.layers": 2},
        mode="whole",
        batch=16,
        length=512,
        train=TrainConfig(steps=3000, lr=4e-3, warmup=100, eval_every=250, save_every=250, sample_every=500),
    )


class Pictures:
    """Pictures of a split with their labels; those named become rows of an array, written by `save`."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, name: str, random: np.random.Generator):
        self.pixels, self.labels, self.name, self.random = pixels, labels, name, random
        self.rows: dict[tuple[int, int, int], int] = {}  # (picture, y, x) -> row

    def part(self, n: int, *, moved: bool = False) -> dict[str, str]:
        """Returns the part of a message that shows picture n, unchanged or moved by up to two pixels."""
        y, x = map(int, self.random.integers(0, 5, 2)) if moved else (2, 2)
        row = self.rows.setdefault((int(n), y, x), len(self.rows))
        return {"type": "image", "image": f"{self.name}.npy[{row}]"}

    def save(self, out: Path) -> None:
        """Writes the array, uint8 `[rows, height, width]`."""
        height, width = self.pixels.shape[1:]
        rows = np.lib.format.open_memmap(out / f"{self.name}.npy", "w+", np.uint8, (len(self.rows), height, width))
        for (n, y, x), row in self.rows.items():
            rows[row] = np.pad(self.pixels[n], 2)[y : y + height, x : x + width]
        rows.flush()

    def asked(self, n: int, way: str, **how: bool) -> Turns:
        """Returns a question about one picture, placed before, after or around it."""
        words, shown = text(QUESTION), self.part(n, **how)
        contents = {"after": [shown, words], "before": [words, shown], "around": [words, shown, words]}
        return [(contents[way], int(self.labels[n]))]

    def row(self, count: int, asked: Iterable[int], **how: bool) -> Turns:
        """Returns questions about some of `count` pictures, numbered from 1."""
        chosen = self.random.integers(0, len(self.labels), count)
        before = [part for k, n in enumerate(chosen, 1) for part in (text(f"{k}:"), self.part(n, **how))]
        turns = []
        for k in asked:
            turns.append(([*before, text(f"Which digit is number {k}?")], int(self.labels[chosen[k - 1]])))
            before = []
        return turns


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def prepare(file: Path, out: Path) -> None:
    """Writes the pictures, and conversations about them."""
    data, random = np.load(file), np.random.default_rng(0)
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    train = Pictures(data["x_train"], data["y_train"], "train", random)
    test = Pictures(data["x_test"], data["y_test"], "test", random)
    order = random.permutation(len(train.labels))
    valid, rest = order[: len(order) // 20], order[len(order) // 20 :]

    def training() -> Iterator[Turns]:
        for n in rest:
            yield train.asked(n, "after")
            way = random.choice(["before", "around", "row", "row", "row", "row"])
            count = int(random.integers(2, MOST + 1, 2).min())  # small counts are more frequent: these are learnt first
            some = random.permutation(count)[:TURNS] + 1
            yield train.row(count, some, moved=True) if way == "row" else train.asked(n, way, moved=True)

    write(out / "train.jsonl", training())
    write(out / "valid.jsonl", (train.asked(n, "after") for n in valid))
    write(out / "test.jsonl", (test.asked(n, "after") for n in range(len(test.labels))))
    few = range(min(ASKED, len(test.labels)))
    for way in ("before", "around"):
        write(out / f"{way}.jsonl", (test.asked(n, way) for n in few))
    labels = random.permutation(test.labels[: len(few)]).tolist()
    shown = (test.asked(n, "after")[0][0] for n in few)
    write(out / "shuffled.jsonl", ([turn] for turn in zip(shown, labels, strict=True)))
    for count in (MOST // 2, MOST):
        for k in range(1, count + 1):
            write(out / f"row{count}-{k}.jsonl", (test.row(count, [k]) for _ in range(len(few) // 5)))
    for pictures in (train, test):
        pictures.save(out)
    for n in range(min(FILES, len(test.pixels))):
        Image.fromarray(test.pixels[n]).save(out / f"pictures/test-{n}.png")


def write(file: Path, conversations: Iterable[Turns]) -> None:
    with open(file, "w", encoding="utf-8") as out:
        for turns in conversations:
            messages = []
            for content, answer in turns:
                messages += [{"role": "user", "content": content}, {"role": "assistant", "content": str(answer)}]
            out.write(json.dumps({"messages": messages}) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    prepare(Path(sys.argv[1]), Path(sys.argv[2]))
