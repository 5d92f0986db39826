"""Tasks of structured prompting (`prompting.py`): texts with classes, whose names are drawn anew for every task."""

import hashlib
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import tyro

from retentive.data.sources import Document

NAMES = ("A", "B", "C", "D")
WORDS = 6
"""Maximum words of a text."""
SHOWN, ASKED = 64, 24
"""Texts that a measured class needs for demonstrations and for questions."""
EPISODE = 48
"""Demonstrations of a task in training."""

Classes = dict[str, dict[str, list[str]]]
"""{class: {source: texts}}; the texts of a source, such as a video or a book, are held out together."""


@dataclass(frozen=True)
class Files:
    """Files of the data sets."""

    data: tyro.conf.Positional[Path]
    """Folder with the files below."""
    novels: str = "novels/train"
    """Folder of novels, a text file each."""
    play: str = "tinyshakespeare/input.txt"
    """Plays in one text file: speeches with a blank line between them, their first lines the names of the speakers."""
    meetings: str = "qmsum/train.jsonl"
    """Meetings, in the format of QMSum."""
    papers: str = "summarization/scitldr/train.jsonl"
    """Abstracts of papers, in the format of SciTLDR."""
    reports: str = "gov_report/gov_report.jsonl"
    """Reports, in the format of GovReport."""
    articles: str = "eval/boolq.jsonl"
    """Passages of articles, in the format of BoolQ."""
    english: str = "translation/enja/train.en"
    """English phrases, a line each."""
    japanese: str = "translation/enja/train.ja"
    """Japanese phrases, a line each."""
    hellaswag: str = "eval/hellaswag.jsonl"
    """HellaSwag: sentences about videos, with the activity that each shows."""


@dataclass(frozen=True)
class Texts:
    """Texts of each class for demonstrations, and texts for questions."""

    shown: dict[str, list[str]]
    asked: dict[str, list[str]]


def rows(path: Path) -> Iterator[dict]:
    """The objects of a JSON Lines file."""
    with open(path, encoding="utf-8") as file:
        yield from map(json.loads, file)


def add(classes: Classes, label: str, source: str, texts: Iterable[str]) -> None:
    """Add the first WORDS words of each text to a class and source, without duplicates and texts under four words."""
    kept = classes[label][source]
    for text in texts:
        words = text.split()[:WORDS]
        if len(words) > 3 and (short := " ".join(words)) not in kept:
            kept.append(short)


def sentences(text: str, most: int = 20) -> list[str]:
    """The first `most` sentences, which end with . ! or ? and white space."""
    return re.split(r"(?<=[.!?])\s+", text)[:most]


def activities(files: Files) -> Classes:
    """The sentences of HellaSwag about videos (not those of WikiHow), by activity; each video is a source."""
    classes: Classes = defaultdict(lambda: defaultdict(list))
    for row in rows(files.data / files.hellaswag):
        if row["source_id"].startswith("activitynet"):
            ending = f"{row['ctx_b']} {row['endings'][int(row['label'])]}"
            add(classes, row["activity_label"], row["source_id"], (row["ctx_a"], ending))
    return classes


def kinds(files: Files) -> Classes:
    """The beginnings of sentences or paragraphs of eight sorts of text, by sort; novels without their front matter."""
    classes: Classes = defaultdict(lambda: defaultdict(list))
    for book in sorted((files.data / files.novels).glob("*.txt")):
        add(classes, "novel", book.stem, book.read_text(encoding="utf-8").split("\n\n")[20:60])
    for n, speech in enumerate((files.data / files.play).read_text(encoding="utf-8").split("\n\n")[:2000]):
        add(classes, "play", f"play {n // 20}", [speech.partition("\n")[2]])
    for n, meeting in enumerate(rows(files.data / files.meetings)):
        add(classes, "meeting", f"meeting {n}", [turn["content"] for turn in meeting["meeting_transcripts"][:40]])
    for n, paper in enumerate(rows(files.data / files.papers)):
        add(classes, "paper", f"paper {n}", paper["source"][:3])
    for report in rows(files.data / files.reports):
        add(classes, "report", report["id"], sentences(report["document"], 200))
    for n, row in enumerate(rows(files.data / files.articles)):
        add(classes, "article", f"passage {n}", sentences(row["passage"], 3))
    for language, name in (("English", files.english), ("Japanese", files.japanese)):
        with open(files.data / name, encoding="utf-8") as file:
            for n, line in enumerate(islice(file, 3000)):
                add(classes, language, f"phrase {n}", [line])
    return classes


def split(classes: Classes, *, new: bool) -> tuple[dict[str, list[str]], Texts, Texts]:
    """(texts to train on, texts of known classes, texts of new ones).

    A fifth of the sources (bucket 0) is for questions only. Classes are measured if they have enough texts. With `new`,
    about two fifths of those are held out of training.
    """
    train: dict[str, list[str]] = {}
    measured = Texts({}, {}), Texts({}, {})  # by `unseen`: known classes, new ones
    for label, sources in sorted(classes.items()):
        shown = [text for source, texts in sources.items() if bucket(source) for text in texts]
        asked = [text for source, texts in sources.items() if not bucket(source) for text in texts]
        large = len(shown) >= SHOWN and len(asked) >= ASKED
        unseen = new and large and bucket(label) < 2
        if large:
            measured[unseen].shown[label], measured[unseen].asked[label] = shown, asked
        if shown and not unseen:
            train[label] = shown
    return train, *measured


def bucket(name: str) -> int:
    """Bucket 0 to 4 by the name's hash, so that a source is always held out or never."""
    return hashlib.sha256(name.encode()).digest()[0] % 5


def line(text: str, label: str, name: str) -> str:
    """A demonstration, one line of text."""
    return f"{text} -> {label} {name}\n"


def tasks(families: Sequence[Mapping[str, Sequence[str]]], count: int, seed: int) -> Iterator[Document]:
    """`count` tasks for training, a document each, of 2, 3 or 4 classes; the families take turns."""
    rng = random.Random(seed)
    for n in range(count):
        texts = families[n % len(families)]
        names = rng.sample(NAMES, rng.randint(2, len(NAMES)))
        named = list(zip(rng.sample(sorted(texts), len(names)), names, strict=True))
        drawn = (rng.choice(named) for _ in range(EPISODE))
        yield Document(f"task {n}", "".join(line(rng.choice(texts[label]), label, name) for label, name in drawn))
