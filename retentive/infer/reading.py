"""Reads documents of any length into a memory file, in prefill chunks; reading can be interrupted and resumed.

    write_memory(model, tokenizer, ["library/"], "library.mem")        files and folders into one file
    ingest(model, pieces, memory)                                      ids into a Memory, for other sources

Each document begins with an end-of-text token, as in training. Progress is saved beside the file every minute and on
interruption, and the same call resumes from there.
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
from retentive.models import LanguageModel

CHUNK = 4096
"""Tokens per call of the model."""
SAVE_EVERY = 60.0
"""Seconds between two saves of the progress."""
PLAIN = (".txt", ".md", ".py", ".rst")
"""Suffixes of plain text files, whose sizes tell how much there is to read."""


class Progress(NamedTuple):
    tokens: int
    """Tokens read so far, including those of the memory that reading began from."""
    share: float | None
    """Fraction of all text read, 0 to 1; None if its length is unknown (compressed files, tables, the hub)."""


Report = Callable[[Progress], object]


def write_memory(
    model: LanguageModel,
    tokenizer: Tokenizer,
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    memory: str | Path | None = None,
    separate: bool = False,
    progress: Report = lambda now: None,
    say: Callable[[str], None] = warnings.warn,
) -> Memory:
    """Reads all documents of `sources` into a memory and saves it to `out`; its size does not depend on their length.

    Args:
        sources: files, folders or hf:NAME, read in this order.
        out: a new file, or the file of `memory`, which is then replaced.
        memory: file of a memory to begin from.
        separate: read each document separately and merge them, so that all are equally near (structured prompting).
        progress: called after each prefill chunk.
        say: called with a line about each file of a folder that is left out.

    Raises:
        ValueError, OSError: as `check`; or a file is not text, or an `OUT.unfinished` is of other documents.
        ArithmeticError: the model's output is not finite.
        KeyboardInterrupt: the progress is in `OUT.unfinished`, and the same call resumes from there (with `separate`
            nothing is kept).
    """
    out = Path(out)
    check(sources, out, memory=memory, separate=separate)
    start = blank(model)
    if memory is not None:
        start = load_memory(memory, model, start.model)  # passes the fingerprint, to hash the weights only once
    texts = Texts(sources, say)
    check_place(out)  # before hours of reading
    if separate:
        merge([start])  # refuses a model whose memories cannot be merged, before anything is read
        found = _apart(model, tokenizer, start.model, texts, progress)
    else:
        found = _in_a_row(model, tokenizer, start, texts, unfinished(out), progress)
    save(found, out)
    unfinished(out).unlink(missing_ok=True)  # after the save, so that a crash in between loses nothing
    return found


def check(sources: Sequence[str | Path], out: Path, *, memory: str | Path | None, separate: bool) -> None:
    """Raises ValueError or OSError for problems that need no model, such as an `out` that exists."""
    if not sources:
        raise ValueError("`sources` is empty; name files to read")
    check_out(out, memory)
    if separate and memory is not None:
        raise ValueError("`separate` and `memory` exclude each other; write a separate memory, then merge both")
    for source in sources:
        if not str(source).startswith("hf:"):
            source_files(source, advise=False)


def check_out(out: Path, memory: str | Path | None = None) -> None:
    """Raises FileExistsError if `out` exists, unless it is the memory to continue from."""
    if out.exists() and (memory is None or out != Path(memory)):
        raise FileExistsError(f"{out} exists: choose another file, nothing is overwritten")


def unfinished(out: Path) -> Path:
    """Returns the file that keeps the progress until `out` is written."""
    return out.with_name(out.name + ".unfinished")


class Texts:
    """The documents of several sources in order, with a count of the bytes encoded so far."""

    def __init__(self, sources: Sequence[str | Path], say: Callable[[str], None]):
        self.sources, self.say = sources, say
        self.total, self.done = total_bytes(sources), 0

    def __iter__(self) -> Iterator[Document]:
        return (document for source in self.sources for document in documents(source, say=self.say, advise=False))

    @property
    def share(self) -> float | None:
        """Fraction of the text encoded, see `Progress.share`."""
        return min(self.done / self.total, 1.0) if self.total else None


def total_bytes(sources: Sequence[str | Path]) -> int | None:
    """Returns the bytes of text in all files; None if one is not plain text, whose size does not tell."""
    if any(str(source).startswith("hf:") for source in sources):
        return None
    files = [file for source in sources for file in source_files(source, advise=False).values()]
    return sum(file.stat().st_size for file in files) if all(f.suffix.lower() in PLAIN for f in files) else None


# two ways of reading: consecutively, and each document separately


def _in_a_row(
    model: LanguageModel, tokenizer: Tokenizer, before: Memory, texts: Texts, path: Path, report: Report
) -> Memory:
    """Reads all documents after `before`; resumes from the unfinished file at `path` if it exists."""
    known: list[str] = []
    sources: list[dict] = []
    memory = start = before
    if path.exists():
        memory = start = load_memory(path, model, before.model)
        if start.sources[: len(before.sources)] != before.sources:
            raise ValueError(f"{path}: continues another memory; give the same `memory`, or delete the file")
        # documents in the unfinished file, the last one perhaps in part
        known = [source["sha256"] for source in start.sources[len(before.sources) :]]
    # Text in the unfinished file is encoded again, which is cheap, and skipped by its token count. The hashes show
    # whether the documents are the same.
    skip = start.tokens - before.tokens - len(before.pending) if start is not before else 0
    ids = _after(skip, _encoded(texts, texts, tokenizer, sources))
    saved = time.monotonic()

    def keep() -> None:
        memory.sources = before.sources + sources
        save(memory, path)

    try:
        for memory in ingest(model, ids, start):
            _check_same(sources, known, path)
            report(Progress(memory.tokens, texts.share))
            if time.monotonic() - saved >= SAVE_EVERY:
                keep()
                saved = time.monotonic()
        _check_same(sources, known, path, whole=True)
    except KeyboardInterrupt:
        if memory is not start:  # otherwise nothing new was read
            keep()
        raise
    memory.sources = before.sources + sources
    return memory


def _apart(model: LanguageModel, tokenizer: Tokenizer, name: str, texts: Texts, report: Report) -> Memory:
    """Reads each document separately and merges them.

    If the memories can be chained, the documents are also read consecutively: the chain's error per layer shows how
    much reading them apart has changed.
    """
    parts: list[Memory] = []
    whole, tokens = blank(model, name), 0
    mixers = model.config.mixers  # of retention, or the merge is refused
    chainable = all(not getattr(mixer, "per_token", False) for mixer in mixers)  # else no chain to compare with

    def read_on(memory: Memory, document: Document, count: Texts | None) -> Memory:
        last = memory
        for last in ingest(model, _encoded([document], count, tokenizer, memory.sources), memory):
            report(Progress(tokens if count is None else tokens + last.tokens, texts.share))
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
    """Yields the ids of all documents, one piece of text at a time.

    Appends each document to `sources`, and counts the encoded bytes in `texts`.
    """
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


def _after(count: int, lists: Iterable[list[int]]) -> Iterator[list[int]]:
    """Yields the ids of `lists` after the first `count`."""
    for ids in lists:
        if count < len(ids):
            yield ids[count:]
        count = max(count - len(ids), 0)


def _check_same(sources: list[dict], known: list[str], path: Path, *, whole: bool = False) -> None:
    """Raises ValueError if the documents so far (with `whole`, all of them) differ from those read by `path`."""
    hashes = [source["sha256"] for source in sources[: len(known)]]
    if hashes != (known if whole else known[: len(hashes)]):
        raise ValueError(f"{path} has read other documents: give the same files in the same order, or delete it")


# from ids to a state


@torch.no_grad()
def ingest(
    model: LanguageModel, pieces: Iterable[Sequence[int]], memory: Memory, *, chunk: int = CHUNK
) -> Iterator[Memory]:
    """Yields the memory after each prefill chunk of the ids in `pieces`, continuing `memory`, which is consumed.

    Activations need the memory of one chunk, however long the text. The caller sets `sources`.

    Raises:
        ArithmeticError: the model's output is not finite, so its state would be useless.
    """
    state: Any = memory.state
    tokens, device = memory.tokens, model.device
    for ids in _chunks(pieces, memory.pending, chunk):
        x, state = model.hidden(torch.tensor([ids], device=device), state)
        tokens += len(ids)
        if not bool(x[:, -1].isfinite().all()):  # the output depends on the whole state, so a NaN in it shows here
            raise ArithmeticError(f"the model's output is not finite after {tokens:,} tokens: nothing to remember")
        yield Memory(state, [], tokens, memory.model, memory.sources, memory.config)


def _chunks(pieces: Iterable[Sequence[int]], first: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yields `first` and the ids of all pieces in lists of `size`; the last one is shorter."""
    held = list(first)
    for piece in pieces:
        held += piece
        while len(held) >= size:
            yield held[:size]
            held = held[size:]
    if held:
        yield held
