"""Small talk trained from scratch on people's chats; about half an hour on two cores.

    pip install chitchat-dataset                          (7,168 chats of students, MIT licence)
    python recipes/dialogue.py chats                      writes chats/train.jsonl and chats/valid.jsonl
    retentive data chats/train.jsonl --valid chats/valid.jsonl --chats --out data/chats
    retentive train --recipe recipes/dialogue.py          (the twin, rows of whole conversations: --model transformer
                                                          --mode whole --length 1024 --batch 4 --out runs/twin)
    retentive chat runs/dialogue                          or: retentive serve runs/dialogue

The first speaker is the user, the other the assistant. Consecutive messages of one speaker are one turn.
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


def conversation(turns: list[list[dict[str, str]]]) -> list[dict[str, str]]:
    """Returns the turns of two people as messages; consecutive turns of one person are joined."""
    messages: list[dict[str, str]] = []
    last = None
    for n, turn in enumerate(turns):
        text = "\n".join(said["text"].strip() for said in turn if said["text"].strip())
        if text and messages and n % 2 == last:  # the other person said nothing in between
            messages[-1]["content"] += "\n" + text
        elif text:
            messages.append({"role": ("user", "assistant")[len(messages) % 2], "content": text})
            last = n % 2
    return messages


def prepare(folder: Path) -> None:
    """Writes the chats that have an answer as JSONL; one in twenty is held out by a hash of its name."""
    import chitchat_dataset

    folder.mkdir(parents=True, exist_ok=True)
    with (
        open(folder / "train.jsonl", "w", encoding="utf-8") as train,
        open(folder / "valid.jsonl", "w", encoding="utf-8") as valid,
    ):
        for name, chat in chitchat_dataset.Dataset().items():
            messages = conversation(chat["messages"])
            if len(messages) < 2:
                continue
            held_out = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0
            (valid if held_out else train).write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
