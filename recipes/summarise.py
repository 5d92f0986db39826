r"""Summaries, and questions about meetings, from JSON lines in one of three formats.

    python recipes/summarise.py SCITLDR/train.jsonl QMSUM/train.jsonl texts/train.jsonl
    python recipes/summarise.py SCITLDR/dev.jsonl texts/abstracts.jsonl
    python recipes/summarise.py QMSUM/val.jsonl texts/meetings.jsonl
    retentive data texts/documents.jsonl --vocab-size 8192 --out data/documents
    retentive train --recipe recipes/summarise.py             (the twin: --model transformer --out runs/documents-twin)
    retentive sft runs/documents --data texts/train.jsonl --valid texts/abstracts.jsonl --out runs/summarise \
        --length 1024 --lr 1e-3                               (the twin: runs/documents-twin, --out runs/summarise-twin)
    retentive eval runs/summarise --tasks summarisation:abstracts,summarisation:meetings --data texts --max-tokens 120
    retentive serve runs/summarise

Lines are {"document": …, "summary": …}, SciTLDR's (source, target) or QMSum's (meeting_transcripts and lists of
queries). train.jsonl gets one conversation per text, which training reads once. Beside it, documents.jsonl has the
texts alone: a model learns the language on them first, since there are too few answers for that. Any other file gets
one conversation per question, as `eval` asks them.
"""

import json
import sys
from pathlib import Path
from typing import Any

from retentive.train import TrainConfig, TrainRun


def recipe() -> TrainRun:
    return TrainRun(
        data=Path("data/documents"),
        out=Path("runs/documents"),
        size="5m",
        mode="reset",
        batch=8,
        length=1024,
        train=TrainConfig(steps=1000, lr=4e-3, warmup=50, eval_every=250, save_every=250, sample_every=500),
    )


def texts_of(row: dict[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """Returns the text of a line, and its (question, answer) pairs.

    Raises:
        ValueError: fields are unknown, there is no text, or a question has no answer.
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
    for question, answer in asked:
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(f"no answer to {question!r}")
    return said, asked


def conversation(said: str, asked: list[tuple[str, str]]) -> dict[str, list[dict[str, str]]]:
    """Returns everything as one conversation; the text precedes the first question."""
    turns = []
    for question, answer in asked:
        text = question if turns else f"{said}\n\n{question}"
        turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


def prepare(files: list[Path], out: Path) -> None:
    """Writes the conversations of all files, and for training also the texts."""
    found = []
    for path in files:
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            sys.exit(f"{path} cannot be read as UTF-8 text: {error}")
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    found.append(texts_of(json.loads(line)))
                except KeyError as error:
                    sys.exit(f"{path}:{number}: a field is missing: {error}")
                except TypeError:
                    sys.exit(f"{path}:{number}: a field is no text or list, as SciTLDR and QMSum have them")
                except ValueError as error:
                    sys.exit(f"{path}:{number}: {error}")
    if not found:
        sys.exit(f"{', '.join(map(str, files))}: no texts in there")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"{out} cannot be written: {error}")
    if out.stem == "train":
        write(out.with_name("documents.jsonl"), [{"text": said} for said, _ in found])
        write(out, [conversation(said, asked) for said, asked in found])
    else:
        write(out, [conversation(said, [one]) for said, asked in found for one in asked])


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    *given, target = map(Path, sys.argv[1:])
    prepare(given, target)
