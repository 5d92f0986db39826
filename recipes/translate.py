"""Translation both ways in one model, from sentence pairs: two files, line n of one is line n of the other.

    python recipes/translate.py English train.en Japanese train.ja pairs/train.jsonl
    python recipes/translate.py English valid.en Japanese valid.ja pairs/valid.jsonl
    retentive data pairs/train.jsonl --valid pairs/valid.jsonl --chats --vocab-size 8192 --out data/pairs
    retentive train --recipe recipes/translate.py          (the twin: --model transformer --out runs/translate-twin)
    retentive eval runs/translate --tasks translation:to-japanese,translation:to-english --data pairs --max-tokens 100
    retentive serve runs/translate                         and the page: "To Japanese: where is the station ?"

The second line also writes what `eval` asks, a file for each way: pairs/to-japanese.jsonl and pairs/to-english.jsonl
(so does every file but one called train.jsonl).
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
    """Writes the pairs in both directions, and those of each by themselves beside it."""
    sides = [path.read_text(encoding="utf-8").removesuffix("\n").split("\n") for path in files]
    if len(sides[0]) != len(sides[1]):
        sys.exit(
            f"{files[0]} has {len(sides[0])} lines and {files[1]} {len(sides[1])}: line n must be line n's translation"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    both = []
    for to, (given, wanted) in ((1, sides), (0, sides[::-1])):
        asked = [
            {"prompt": f"To {languages[to]}: {source.strip()}", "completion": target.strip()}
            for source, target in zip(given, wanted, strict=True)
            if source.strip() and target.strip()
        ]
        both.append(asked)
        if out.name != "train.jsonl":  # what is trained on is not asked
            write(out.with_name(f"to-{languages[to].lower()}.jsonl"), asked)
    # in turns, so that a part of the file has both
    write(out, [each for pair in zip(*both, strict=True) for each in pair])


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 6:
        sys.exit(__doc__)
    first, one, second, other, out = sys.argv[1:]
    prepare((first, second), (Path(one), Path(other)), Path(out))
