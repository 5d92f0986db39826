r"""Handwritten digits, from an .npz of pictures and labels (x_train, y_train, x_test, y_test: MNIST as Keras has it).

    python recipes/see.py mnist.npz digits
    retentive data digits/train.jsonl --valid digits/valid.jsonl --chats --tokenizer bytes \
        --image size=28 patch=7 channels=1 --out data/seen
    retentive train --recipe recipes/see.py                 (the twin: --model transformer --out runs/see-twin)
    retentive eval runs/see --tasks answers:test --data digits --max-tokens 4
    retentive generate runs/see --image digits/test/0.png --prompt "Which digit?"

Trained on the pictures as they are and moved by up to two pixels; a twentieth of those to train on is held out.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from retentive.train import TrainConfig, TrainRun


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


def prepare(file: Path, out: Path) -> None:
    """Writes the pictures and the conversations about them."""
    data, random = np.load(file), np.random.default_rng(0)
    order = random.permutation(len(data["x_train"]))
    valid, train = order[: len(order) // 20], order[len(order) // 20 :]
    pictures, labels = data["x_train"], data["y_train"]

    def moved() -> Iterable[tuple[np.ndarray, int]]:
        for n in train:
            yield pictures[n], labels[n]
            wide = np.pad(pictures[n], 2)
            y, x = random.integers(0, 5, 2)
            yield wide[y : y + pictures.shape[1], x : x + pictures.shape[2]], labels[n]

    write(out, "train", moved())
    write(out, "valid", zip(pictures[valid], labels[valid], strict=True))
    write(out, "test", zip(data["x_test"], data["y_test"], strict=True))


def write(out: Path, name: str, pictures: Iterable[tuple[np.ndarray, int]]) -> None:
    """out/NAME.jsonl, and the pictures that it names in out/NAME/."""
    (out / name).mkdir(parents=True, exist_ok=True)
    with open(out / f"{name}.jsonl", "w", encoding="utf-8") as file:
        for n, (pixels, label) in enumerate(pictures):
            Image.fromarray(pixels).save(out / name / f"{n}.png")
            seen = [{"type": "image", "image": f"{name}/{n}.png"}, {"type": "text", "text": "Which digit?"}]
            turns = [{"role": "user", "content": seen}, {"role": "assistant", "content": str(label)}]
            file.write(json.dumps({"messages": turns}) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    prepare(Path(sys.argv[1]), Path(sys.argv[2]))
