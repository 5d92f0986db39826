"""Reading documents of any length into a memory file: by prefill chunks, to be broken off and gone on with.

    write_memory(model, tokenizer, ["library/"], "library.mem")        files and folders into one file
    ingest(model, pieces, memory)                                      ids into a Memory, for other sources

Each document stands after an end-of-text token, as in training. What was read so far is kept beside the file every
minute and when reading is interrupted, so that the same call goes on from there.
"""

import hashlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from retentive.data.pack import pieces
from retentive.data.sources import Document, documents, source_files
from retentive.data.tokenizer import Tokenizer
from retentive.files import check_place
from retentive.infer.memory import Memory, blank, load_memory, save
from retentive.infer.merge import chain_errors, merge
from retentive.models import Model

CHUNK = 4096
"""Tokens that go through the model at once."""
SAVE_EVERY = 60.0
"""Seconds between two files of what was read so far."""
PLAIN = (".txt", ".md", ".py", ".rst")
"""Files that are all text, so that their size tells how much there is to read."""


class Progress(NamedTuple):
    tokens: int
    """Read so far, those of the memory that was gone on from among them."""
    share: float | None
    """Of all that there is to read, 0 to 1; None where that is not known (compressed files, tables, the hub)."""


Tell = Callable[[Progress], object]


def write_memory(
    model: Model,
    tokenizer: Tokenizer,
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    memory: str | Path | None = None,
    separate: bool = False,
    progress: Callable[[Progress], object] = lambda told: None,
    say: Callable[[str], None] = warnings.warn,
) -> Memory:
    """The memory of all documents of `sources`, which is saved to `out`; memory does not grow with their length.

    Args:
        sources: files or folders, or hf:NAME, read in this order.
        out: a new file, or that of `memory`.
        memory: the file of a memory to go on from.
        separate: read each document for itself and merge them, so that all are equally near (structured prompting).
        progress: is told how far it is, after each prefill chunk.
        say: is told in a line what is left out of a folder.

    Raises:
        ValueError, OSError: what `check` refuses; a file that is no text; `OUT.unfinished` of other documents.
        ArithmeticError: the model's output is not finite.
        KeyboardInterrupt: what was read until then is in `OUT.unfinished`, and the same call goes on from there (not
            if `separate`, which keeps nothing).
    """
    out = Path(out)
    check(sources, out, memory=memory, separate=separate)
    start = blank(model)
    if memory is not None:
        start = load_memory(memory, model, start.model)
    texts = Texts(sources, say)
    check_place(out)
    if separate:
        merge([start])  # a model whose memories cannot be merged is refused before anything is read
        found = _apart(model, tokenizer, start.model, texts, progress)
    else:
        found = _in_a_row(model, tokenizer, start, texts, unfinished(out), progress)
    save(found, out)
    unfinished(out).unlink(missing_ok=True)
    return found


def check(sources: Sequence[str | Path], out: Path, *, memory: str | Path | None, separate: bool) -> None:
    """Raises ValueError or OSError for what can be refused before a model is loaded: nothing to read, no place."""
    if not sources:
        raise ValueError("write needs files to read: retentive memory write RUN FILES… --out FILE")
    if out.exists() and (memory is None or out != Path(memory)):
        raise FileExistsError(f"{out} exists: choose another file, nothing is overwritten")
    if separate and memory is not None:
        raise ValueError("--separate and --memory exclude each other: write apart, then retentive memory merge")
    for source in sources:
        if not str(source).startswith("hf:"):
            source_files(source)


def unfinished(out: Path) -> Path:
    """Where what was read so far lies until `out` is written."""
    return out.with_name(out.name + ".unfinished")


class Texts:
    """The documents of several sources, and how much of their text has been encoded."""

    def __init__(self, sources: Sequence[str | Path], say: Callable[[str], None]):
        self.sources, self.say = sources, say
        self.total, self.done = total_bytes(sources), 0

    def __iter__(self) -> Iterator[Document]:
        return (document for source in self.sources for document in documents(source, say=self.say))

    @property
    def share(self) -> float | None:
        return min(self.done / self.total, 1.0) if self.total else None


def total_bytes(sources: Sequence[str | Path]) -> int | None:
    """Bytes of text in all files; None where there are others than plain text."""
    if any(str(source).startswith("hf:") for source in sources):
        return None
    files = [file for source in sources for file in source_files(source).values()]
    return sum(file.stat().st_size for file in files) if all(f.suffix.lower() in PLAIN for f in files) else None


# the ways of reading


def _in_a_row(model: Model, tokenizer: Tokenizer, before: Memory, texts: Texts, path: Path, progress: Tell) -> Memory:
    """`before`, and then all documents; goes on from the file at `path` if there is one."""
    known: list[str] = []
    sources: list[dict] = []
    memory = start = before
    if path.exists():
        memory = start = load_memory(path, model, before.model)
        if start.sources[: len(before.sources)] != before.sources:
            raise ValueError(f"{path} went on from another memory: give the same --memory, or delete it")
        known = [source["sha256"] for source in start.sources[len(before.sources) :]]
    # what the unfinished file holds is encoded once more, but not read: its documents are known by their hashes
    skip = start.tokens - before.tokens - len(before.pending) if start is not before else 0
    ids = _after(skip, _encoded(texts, texts, tokenizer, sources))
    saved = time.monotonic()

    def keep() -> None:
        memory.sources = before.sources + sources
        save(memory, path)

    try:
        for memory in ingest(model, ids, start):
            _check_same(sources, known, path)
            progress(Progress(memory.tokens, texts.share))
            if time.monotonic() - saved >= SAVE_EVERY:
                keep()
                saved = time.monotonic()
        _check_same(sources, known, path, whole=True)
    except KeyboardInterrupt:
        if memory is not start:
            keep()
        raise
    memory.sources = before.sources + sources
    return memory


def _apart(model: Model, tokenizer: Tokenizer, name: str, texts: Texts, progress: Tell) -> Memory:
    """The documents read each for itself and merged; and in a row too, which tells each layer's error of a chain."""
    parts: list[Memory] = []
    whole, tokens = blank(model, name), 0
    chainable = whole.config["decay"] != "gated"  # else there is no chain, and nothing to compare

    def read_on(memory: Memory, document: Document, count: Texts | None) -> Memory:
        last = memory
        for last in ingest(model, _encoded([document], count, tokenizer, memory.sources), memory):
            progress(Progress(tokens if count is None else tokens + last.tokens, texts.share))
        return last

    for document in texts:
        parts.append(read_on(blank(model, name), document, texts))
        tokens += parts[-1].tokens
        if chainable:
            whole = read_on(whole, document, None)
    merged = merge(parts)
    if chainable:
        merged.errors = chain_errors(parts, whole)
    return merged


def _encoded(
    documents: Iterable[Document], texts: Texts | None, tokenizer: Tokenizer, sources: list[dict]
) -> Iterator[list[int]]:
    """The ids of all documents, a text piece at a time; notes each document in `sources`, and its bytes in `texts`."""
    for document in documents:
        digest = hashlib.sha256(document.text.encode()).hexdigest()
        source = {"name": document.name, "tokens": 0, "sha256": digest}
        sources.append(source)
        begin = [tokenizer.eos_id]
        for piece in pieces(document.text):
            ids = begin + tokenizer.encode(piece)
            source["tokens"] += len(ids)
            begin = []
            if texts is not None:
                texts.done += len(piece.encode())
            yield ids


def _after(count: int, pieces: Iterable[list[int]]) -> Iterator[list[int]]:
    """What comes after the first `count` ids."""
    for ids in pieces:
        if count < len(ids):
            yield ids[count:]
        count = max(count - len(ids), 0)


def _check_same(sources: list[dict], known: list[str], path: Path, *, whole: bool = False) -> None:
    """Refuses to go on from what was read of other documents."""
    hashes = [source["sha256"] for source in sources[: len(known)]]
    if hashes != (known if whole else known[: len(hashes)]):
        raise ValueError(f"{path} has read other documents: give the same files in the same order, or delete it")


# ids


@torch.no_grad()
def ingest(model: Model, pieces: Iterable[Sequence[int]], memory: Memory, *, chunk: int = CHUNK) -> Iterator[Memory]:
    """The memory after each prefill chunk of the ids in `pieces`, going on from `memory` (which is used up).

    Reading takes the memory of one chunk, however much there is; `sources` are the caller's to write.

    Raises:
        ArithmeticError: the model's output is not finite, so that its state would be worth nothing.
    """
    state: Any = memory.state
    tokens, device = memory.tokens, model.device
    for ids in _chunks(pieces, memory.pending, chunk):
        x, state = model.hidden(torch.tensor([ids], device=device), state)
        tokens += len(ids)
        if not bool(x[:, -1].isfinite().all()):  # it has read the state: NaN in there has come out
            raise ArithmeticError(f"the model's output is not finite after {tokens:,} tokens: nothing to remember")
        yield Memory(state, [], tokens, memory.model, memory.sources, memory.config)


def _chunks(pieces: Iterable[Sequence[int]], first: Sequence[int], size: int) -> Iterator[list[int]]:
    held = list(first)
    for piece in pieces:
        held += piece
        while len(held) >= size:
            yield held[:size]
            held = held[size:]
    if held:
        yield held
