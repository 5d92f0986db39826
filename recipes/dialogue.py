"""Small talk from the beginning: people's chats, a turn a message, about half an hour on two cores.

    pip install chitchat-dataset                          (7,168 chats of students, MIT licence)
    python recipes/dialogue.py chats                      writes chats/train.jsonl and chats/valid.jsonl
    retentive data chats/train.jsonl --valid chats/valid.jsonl --chats --out data/chats
    retentive train --recipe recipes/dialogue.py          (the twin: --model transformer --mode whole --out runs/twin)
    retentive chat runs/dialogue                          or: retentive serve runs/dialogue

Who speaks first is the user, who answers is the assistant; what one of them says in several messages is one turn.
"""

import hashlib
import json
import sys
from pathlib import Path

from retentive.train import TrainConfig, TrainRun


def recipe() -> TrainRun:
    return TrainRun(
        data=Path("data/chats"),
        out=Path("runs/dialogue"),
        size="5m",
        mode="carry",
        batch=16,
        length=256,
        train=TrainConfig(steps=3000, lr=4e-3, warmup=100, eval_every=250, save_every=250, sample_every=500),
    )


def prepare(folder: Path) -> None:
    """Writes the chats that have an answer as JSONL, one in twenty held out by a hash of its name."""
    import chitchat_dataset

    folder.mkdir(parents=True, exist_ok=True)
    with (
        open(folder / "train.jsonl", "w", encoding="utf-8") as train,
        open(folder / "valid.jsonl", "w", encoding="utf-8") as valid,
    ):
        for name, chat in chitchat_dataset.Dataset().items():
            said = ("\n".join(m["text"].strip() for m in turn if m["text"].strip()) for turn in chat["messages"])
            turns = [text for text in said if text]
            if len(turns) < 2:
                continue
            messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
            held_out = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0
            (valid if held_out else train).write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
