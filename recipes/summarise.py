"""Summaries, and questions about meetings, from files of JSON lines in which each has its own fields.

    python recipes/summarise.py SCITLDR/train.jsonl QMSUM/train.jsonl texts/train.jsonl
    python recipes/summarise.py SCITLDR/dev.jsonl texts/abstracts.jsonl
    python recipes/summarise.py QMSUM/val.jsonl texts/meetings.jsonl
    retentive data texts/train.jsonl --valid texts/abstracts.jsonl --chats --vocab-size 8192 --out data/texts
    retentive train --recipe recipes/summarise.py       (the twin: --model transformer --mode whole --out runs/twin)
    retentive eval runs/summarise --tasks summarisation:abstracts,summarisation:meetings --data texts --max-tokens 120
    retentive serve runs/summarise

Lines are {"document": …, "summary": …}, or SciTLDR's (source, target) or QMSum's (meeting_transcripts and lists of
queries). What is written to train.jsonl has a conversation a text, which is read once in training; any other file has
one a question, as `eval` asks them.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retentive.train import TrainConfig, TrainRun

Turns = list[dict[str, str]]


def recipe() -> TrainRun:
    return TrainRun(
        data=Path("data/texts"),
        out=Path("runs/summarise"),
        size="5m",
        mode="carry",
        batch=8,
        length=1024,
        train=TrainConfig(steps=2000, lr=4e-3, warmup=100, eval_every=250, save_every=250, sample_every=500),
    )


def conversations(row: dict[str, Any], apart: bool) -> Iterator[Turns]:
    """What a line of a file gives; its questions in one conversation, or in one each.

    Raises:
        ValueError: fields that are not known, or a text without a summary.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {type(row).__name__}")
    if "document" in row and "summary" in row:
        said, asked = row["document"], [("Summarise this.", row["summary"])]
    elif "meeting_transcripts" in row:
        said = "\n".join(f"{turn['speaker']}: {turn['content']}" for turn in row["meeting_transcripts"])
        asked = [(q["query"], q["answer"]) for q in [*row["general_query_list"], *row["specific_query_list"]]]
    elif isinstance(row.get("source"), list) and isinstance(row.get("target"), list):
        said, asked = " ".join(row["source"]), [("Summarise this.", text) for text in row["target"][:1]]
    else:
        raise ValueError(f"expected document and summary, or SciTLDR's or QMSum's fields, got {', '.join(row)}")
    if not isinstance(said, str) or not said.strip() or not asked:
        raise ValueError("no text, or nothing is asked of it")
    for part in [[each] for each in asked] if apart else [asked]:
        turns: Turns = []
        for question, answer in part:
            if not isinstance(answer, str) or not answer.strip():
                raise ValueError(f"no answer to {question!r}")
            text = question if turns else f"{said}\n\n{question}"
            turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        yield turns


def prepare(files: list[Path], out: Path) -> None:
    """Writes the conversations of all files; of a file by itself, each question in one of its own."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
            if not line.strip():
                continue
            try:
                made = list(conversations(json.loads(line), apart=out.stem != "train"))
            except (ValueError, KeyError, TypeError) as error:
                sys.exit(f"{path}:{number}: {type(error).__name__}: {error}")
            lines += [json.dumps({"messages": turns}, ensure_ascii=False) for turns in made]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    *given, target = map(Path, sys.argv[1:])
    prepare(given, target)
