"""Translation in both directions by one model, from sentence pairs: line n of one file translates line n of the other.

    python recipes/translate.py English train.en Japanese train.ja pairs/train.jsonl
    python recipes/translate.py English valid.en Japanese valid.ja pairs/valid.jsonl
    retentive data pairs/train.jsonl --valid pairs/valid.jsonl --chats --vocab-size 8192 --out data/pairs
    retentive train --recipe recipes/translate.py          (the twin: --model transformer --out runs/translate-twin)
    retentive eval runs/translate --tasks translation:to-japanese,translation:to-english --data pairs --max-tokens 100
    retentive serve runs/translate                         and the page: "To Japanese: where is the station ?"

The second line also writes the questions for `eval`, one file per direction: pairs/to-japanese.jsonl and
pairs/to-english.jsonl (as for every output not called train.jsonl).
"""

import json
import sys
from pathlib import Path

from retentive.train import TrainConfig, TrainRun


def recipe() -> TrainRun:
    return TrainRun(
        data=Path("data/pairs"),
        out=Path("runs/translate"),
        size="5m",
        set={"dropout": 0.1},
        mode="whole",
        batch=16,
        length=512,
        train=TrainConfig(steps=2500, lr=4e-3, warmup=100, eval_every=250, save_every=250, sample_every=500),
    )


def prepare(languages: tuple[str, str], files: tuple[Path, Path], out: Path) -> None:
    """Writes the pairs in both directions, and beside it each direction on its own."""
    try:
        sides = [path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n") for path in files]
        out.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"two files of UTF-8 text are read, and a file in a folder is written: {error}")
    if len(sides[0]) != len(sides[1]):
        sys.exit(
            f"{files[0]} has {len(sides[0])} lines and {files[1]} {len(sides[1])}: line n must be line n's translation"
        )
    pairs = [pair for pair in zip(*sides, strict=True) if all(text.strip() for text in pair)]
    if blank := len(sides[0]) - len(pairs):
        print(f"{blank} of {len(sides[0])} pairs are left out: one of their lines is blank", file=sys.stderr)
    if not pairs:
        sys.exit(f"{files[0]} and {files[1]} hold no pair of sentences")
    both = []
    for to in (1, 0):
        asked = [
            {"prompt": f"To {languages[to]}: {pair[1 - to].strip()}", "completion": pair[to].strip()} for pair in pairs
        ]
        both.append(asked)
        if out.name != "train.jsonl":  # training pairs are not test questions
            write(out.with_name(f"to-{languages[to].lower()}.jsonl"), asked)
    # alternating, so that any part of the file has both directions
    write(out, [each for pair in zip(*both, strict=True) for each in pair])


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 6:
        sys.exit(__doc__)
    first, one, second, other, out = sys.argv[1:]
    prepare((first, second), (Path(one), Path(other)), Path(out))
