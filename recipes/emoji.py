r"""Emoji naming: the name of a picture, among 1,910 names, from Google's pictures.

    npm pack emoji-datasource-google && tar xf emoji-datasource-google-*.tgz      (pictures Apache 2.0, data MIT)
    python recipes/emoji.py package emoji
    retentive data emoji/train.jsonl --valid emoji/valid.jsonl --chats --vocab-size 1024 \
        --image size=64 patch=16 --out data/emoji
    retentive train --recipe recipes/emoji.py               (the twin: --model transformer --out runs/emoji-twin)
    retentive eval runs/emoji --tasks naming:kin,naming:new,answers:kin --data emoji --max-tokens 40
    retentive generate runs/emoji --image emoji/pictures.zip/1f98a.png --prompt "What is it?"

One picture in ten is held out. Many emoji of people have several pictures, one per skin colour, so there are two tests:
new pictures of emoji seen in training (kin), and pictures of new emoji (new), whose names must be composed from known
parts. Training shows each picture many times: moved, rotated, scaled, brightened or darkened, on another colour.
"""

import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from PIL import Image, ImageEnhance

from retentive.train import TrainConfig, TrainRun

QUESTION = "What is it?"
SHOWN = 12
"""Number of variations of each picture, in addition to the original."""


def recipe() -> TrainRun:
    return TrainRun(
        data=Path("data/emoji"),
        out=Path("runs/emoji"),
        size="1m",
        set={"dropout": 0.1, "image.layers": 3},
        mode="whole",
        batch=16,
        length=512,
        train=TrainConfig(steps=1000, lr=4e-3, warmup=100, eval_every=250, save_every=250, sample_every=500),
    )


def prepare(package: Path, out: Path) -> None:
    """Writes the pictures, and conversations about them."""
    emoji = [e for e in json.loads((package / "emoji.json").read_text(encoding="utf-8")) if e["has_img_google"]]
    files = {one["image"]: e["name"].lower() for e in emoji for one in [e, *e.get("skin_variations", {}).values()]}
    files = {file: name for file, name in files.items() if (package / "img/google/64" / file).is_file()}
    draw = random.Random(0)
    order = sorted(files)
    draw.shuffle(order)
    held_out, trained = order[: len(order) // 10], order[len(order) // 10 :]
    names = {files[file] for file in trained}
    out.mkdir(parents=True, exist_ok=True)
    pictures = {file: opened(package / "img/google/64" / file) for file in order}
    kin, new = ([file for file in held_out if (files[file] in names) == known] for known in (True, False))
    write(out / "kin.jsonl", ((file, files[file]) for file in kin))
    write(out / "new.jsonl", ((file, files[file]) for file in new))
    write(out / "valid.jsonl", ((file, files[file]) for file in held_out))

    with ZipFile(out / "pictures.zip", "w") as archive:  # PNG is compressed already

        def add(name: str, picture: Image.Image) -> None:
            with archive.open(name, "w") as member:
                picture.save(member, "PNG")

        def shown() -> Iterable[tuple[str, str]]:
            for n in range(SHOWN + 1):
                for file in trained:
                    name = f"{Path(file).stem}+{n}.png" if n else file
                    if n:
                        add(name, varied(pictures[file], draw))
                    yield name, files[file]

        for file, picture in pictures.items():
            add(file, picture)
        write(out / "train.jsonl", shown())
    (out / "names.txt").write_text("".join(f"{name}\n" for name in sorted(set(files.values()))), encoding="utf-8")


def opened(file: Path) -> Image.Image:
    """Returns the picture in a file, with transparency."""
    with Image.open(file) as picture:
        return picture.convert("RGBA")


def varied(picture: Image.Image, draw: random.Random) -> Image.Image:
    """Returns the picture moved, rotated, scaled, with other brightness and background."""
    side, scale = picture.width, draw.uniform(0.8, 1.1)
    small = picture.rotate(draw.uniform(-12, 12), Image.Resampling.BICUBIC).resize((round(side * scale),) * 2)
    red, green, blue, alpha = ImageEnhance.Color(small).enhance(draw.uniform(0.6, 1.4)).split()
    light = ImageEnhance.Brightness(Image.merge("RGB", (red, green, blue))).enhance(draw.uniform(0.8, 1.2))
    colour = (255, 255, 255) if draw.random() < 0.5 else tuple(draw.randint(0, 255) for _ in range(3))
    ground = Image.new("RGB", (side, side), colour)
    x, y = ((side - small.width) // 2 + draw.randint(-4, 4) for _ in range(2))
    ground.paste(light, (x, y), alpha)
    return ground


def write(file: Path, shown: Iterable[tuple[str, str]]) -> None:
    with open(file, "w", encoding="utf-8") as out:
        for name, answer in shown:
            parts: list[dict[str, Any]] = [{"type": "image", "image": f"pictures.zip/{name}"}]
            turns = [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]
            out.write(json.dumps({"messages": [*turns, {"role": "assistant", "content": answer}]}) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    prepare(Path(sys.argv[1]), Path(sys.argv[2]))
