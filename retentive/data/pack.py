"""Packs documents into a folder of memory-mappable token shards, from which every run reads its data.

    train-00000.bin   token ids, with an end-of-text id after every document; little-endian uint16, or uint32 for
                      larger vocabularies
    train-00000.idx   uint64: document ends, just after that id, counted from the shard's start
    train-00000.ans   for conversations: per id 1 if it belongs to an answer, which training predicts, else 0
    train-00000.image, .audio   for pictures and sound: one row of numbers for each of their placeholders, in order
    valid-00000.*     the same for the held-out text
    meta.json         sizes, hashes, and the hash of the tokenizer
    tokenizer.json    the tokenizer
    chat_template.jinja   for conversations: their chat template

A conversation is stored as the template renders it, with no end-of-text id but the template's own. Shards end at
document ends. The folder is written atomically.
"""

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from retentive.data.chats import Conversation
from retentive.data.media import Media, media_of
from retentive.data.sources import Document
from retentive.data.templates import TEMPLATE, ChatTemplate
from retentive.data.tokenizer import Tokenizer
from retentive.files import file_sha256, only_writer, replace_folder, write_text

FORMAT, VERSION = "retentive-pack", 1
SPLITS = ("train", "valid")
PIECE = 1 << 16
"""Characters encoded as one text: HF tokenizers are slower on longer ones."""
BATCH = 1 << 22
"""Characters encoded in one call, on all cores."""
_OURS = re.compile(
    r"meta\.json|tokenizer\.json|tokenizer_config\.json|chat_template\.jinja|(train|valid)-\d{5,}\.(bin|idx|ans|image|audio)"
)


@dataclass(frozen=True)
class Shard:
    """One .bin file with its .idx."""

    tokens: int
    """Number of ids in the .bin, end-of-text ids included."""
    documents: int
    """Number of document ends in the .idx."""
    sha256: str
    """Hash of the .bin."""
    answers_sha256: str = ""
    """Hash of the .ans, for conversations."""
    rows: dict[str, int] | None = None
    """Number of rows in the .image and in the .audio, if present."""
    rows_sha256: dict[str, str] | None = None
    """Hashes of these files."""


@dataclass(frozen=True)
class Split:
    """The training text or the held-out text."""

    documents: int
    """Number of documents."""
    tokens: int
    """Number of ids, end-of-text ids included."""
    bytes: int
    """UTF-8 bytes of the text, for bits per byte."""
    shards: tuple[Shard, ...]
    """The shards in order."""
    answers: int | None = None
    """Number of ids in answers; None if all ids are trained on."""


@dataclass(frozen=True)
class Meta:
    """The content of meta.json."""

    dtype: str
    """"uint16" or "uint32": type of the ids, little-endian."""
    vocab_size: int
    """Number of rows that a model's embedding needs."""
    eos_id: int
    """The id after every document."""
    tokenizer_sha256: str
    """`Tokenizer.sha256` of the tokenizer beside the data."""
    splits: dict[str, Split]
    """"train" and "valid"."""
    media: dict[str, dict[str, Any]] | None = None
    """For image and audio, if present: how they were turned into rows (fields of the encoder's config)."""

    @property
    def chats(self) -> bool:
        """True for conversations, where only answers are trained on."""
        return self.splits["train"].answers is not None


class Encoded(NamedTuple):
    """A piece of a document, encoded."""

    ids: list[int]
    size: int
    """UTF-8 bytes of its text."""
    last: bool
    """True if the document ends with this piece."""
    answers: list[bool] | None = None
    """For conversations: True for each id of an answer."""
    media: Sequence[Media] = ()
    """For conversations: pictures and sounds whose placeholders are among the ids."""


def shard_path(folder: str | Path, split: str, number: int, suffix: str) -> Path:
    """Returns the path of a file of one shard."""
    return Path(folder) / f"{split}-{number:05d}{suffix}"


def pack(
    out: str | Path,
    tokenizer: Tokenizer,
    train: Iterable[Document],
    valid: Iterable[Document],
    *,
    shard_tokens: int = 100_000_000,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Meta:
    """Writes the packed folder `out` and returns its meta.

    Args:
        train: training documents, read to their end before `valid`.
        valid: held-out documents; may be empty.
        shard_tokens: a shard ends with the document that brings it to this many tokens.
        progress: called repeatedly with the bytes of text finished since the last call.

    Raises:
        ValueError: there is no training text.
        FileExistsError: `out` already holds something, see `check_free`.
        BlockingIOError: another process is writing it.
    """
    with only_writer(Path(out)):
        check_free(out, overwrite=overwrite)
        return write_packed(out, tokenizer, train, valid, shard_tokens=shard_tokens, progress=progress)


def write_packed(
    out: str | Path,
    tokenizer: Tokenizer,
    train: Iterable[Any],
    valid: Iterable[Any],
    *,
    shard_tokens: int = 100_000_000,
    progress: Callable[[int], None] | None = None,
    template: ChatTemplate | None = None,
    media: dict[str, dict[str, Any]] | None = None,
) -> Meta:
    """Writes as `pack`, for a caller that already holds `only_writer` of `out` and has checked that it is free.

    Args:
        template: given if the documents are conversations; renders them.
        media: as in Meta.
    """
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens is {shard_tokens}: expected a positive number of tokens")
    beyond = max((how["token"] for how in (media or {}).values()), default=0)
    dtype = "uint16" if max(tokenizer.vocab_size, beyond + 1) <= 1 << 16 else "uint32"
    encode = partial(_encoded, tokenizer=tokenizer) if template is None else partial(_spelt, template=template)

    def fill(folder: Path) -> Meta:
        splits = {}
        for name, documents in zip(SPLITS, (train, valid), strict=True):
            splits[name] = _write_split(folder, name, encode(documents), dtype, shard_tokens, progress)
            if not splits["train"].tokens:  # checked after the first split, before encoding the second
                raise ValueError("no training text: every document was empty or held out for validation")
        meta = Meta(dtype, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.sha256, splits, media or None)
        # fields that only conversations have are left out for other data, which keeps the hash of equal text equal
        described = dataclasses.asdict(meta, dict_factory=lambda pairs: {k: v for k, v in pairs if v not in (None, "")})
        content = {"format": FORMAT, "version": VERSION, **described}
        with _named_as_ours():
            tokenizer.save(folder)
            if template is not None:
                write_text(folder / TEMPLATE, template.source)
            write_text(folder / "meta.json", json.dumps(content, indent=1))
        return meta

    return replace_folder(Path(out), fill)


def check_free(out: str | Path, *, overwrite: bool = False) -> None:
    """Raises FileExistsError unless `out` is absent, empty, or (with overwrite) holds only packed data."""
    out = Path(out)
    try:
        out.stat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:  # in a folder without permission
        raise type(error)(f"cannot write {out}: {str(error.strerror).lower()}") from None
    if not out.is_dir():
        raise FileExistsError(f"{out} is a file: choose a new folder for the packed data")
    others = sorted(entry.name for entry in out.iterdir() if not _OURS.fullmatch(entry.name))
    if others:
        raise FileExistsError(f"{out} holds other things ({others[0]}): choose a new or an empty folder")
    if any(out.iterdir()) and not overwrite:
        raise FileExistsError(f"{out} holds packed data: choose another folder, or replace it with `overwrite=True`")


def load_meta(path: str | Path, *, verify: bool = False) -> Meta:
    """Reads the meta of a packed folder and checks that all files exist in full length.

    Args:
        verify: also compare the hashes of the shards, which reads them completely.

    Raises:
        FileNotFoundError: there is no such folder, or no packed data in it.
        ValueError: it is damaged, incomplete, or of another version.
    """
    path = Path(path)
    file = path / "meta.json"
    if not file.is_file():
        what = "holds no meta.json" if path.is_dir() else "is not a folder" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {what}: expected a folder that `retentive data` wrote")
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError:
        raise ValueError(f"{file} is not JSON: the folder is damaged, pack the data again") from None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise ValueError(f"{file} is of another program: expected a folder that `retentive data` wrote")
    if (version := content.pop("version", None)) != VERSION:
        raise ValueError(f"{file} has format version {version}, this program reads {VERSION}: pack the data again")
    try:
        splits = content.pop("splits")
        for name, split in splits.items():
            splits[name] = Split(**split | {"shards": tuple(Shard(**shard) for shard in split["shards"])})
        meta = Meta(**content, splits=splits)
        if meta.dtype not in ("uint16", "uint32"):
            raise TypeError(f"ids of type {meta.dtype!r}")
        if missing := set(SPLITS) - set(splits):
            raise KeyError(*missing)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error}): pack the data again") from None
    _check_shards(path, meta, verify)
    return meta


def row_type(meta: Meta, kind: str) -> np.dtype:
    """Returns the dtype of a whole row of an .image or .audio file."""
    how = (meta.media or {})[kind]
    return np.dtype((np.dtype(how["dtype"]).newbyteorder("<"), (how["features"],)))


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """Yields the text in pieces of at most `size` characters, cut at line ends where possible.

    At a cut the ids may differ from those of the whole text (a tokenizer may have a token for two line ends). Once in
    PIECE characters this is harmless.
    """
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end  # rfind returns -1 if there is none
        yield text[start:end]
        start = end


def _encoded(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Encodes texts in pieces, in order; a document's last piece gets the end-of-text id."""
    batch: list[tuple[str, bool]] = []
    waiting = 0  # characters in the batch

    def flush() -> Iterator[Encoded]:
        texts = [piece for piece, _ in batch]
        for ids, (piece, last) in zip(tokenizer.encode_batch(texts), batch, strict=True):
            yield Encoded([*ids, tokenizer.eos_id] if last else ids, len(piece.encode()), last)
        batch.clear()

    for document in documents:
        left = len(document.text)  # 0 after the last piece; an empty document yields nothing
        for piece in pieces(document.text):
            left -= len(piece)
            waiting += len(piece)
            batch.append((piece, not left))
            if waiting >= BATCH:
                yield from flush()
                waiting = 0
    yield from flush()


def _spelt(conversations: Iterable[Conversation], template: ChatTemplate) -> Iterator[Encoded]:
    """Encodes conversations by the template."""

    def flush() -> Iterator[Encoded]:
        for (ids, answers), each in zip(_taught(template, batch), batch, strict=True):
            media = media_of(each.messages)
            before = zip(ids, answers, answers[1:], strict=False)  # an answer begins where `answers` turns True
            if media and any(follows and not answer and id >= words for id, answer, follows in before):
                raise ValueError(
                    f"{each.name}: the template puts nothing between a picture or sound and the answer, which cannot "
                    "be asked for so: have it say whose turn it is"
                )
            yield Encoded(ids, len(each.text.encode()), True, answers, media)
        batch.clear()

    batch: list[Conversation] = []
    words = template.tokenizer.vocab_size  # ids from here on are placeholders
    waiting = 0  # characters in the batch
    for each in conversations:
        batch.append(each)
        waiting += len(each.text) + sum(media.rows.nbytes for media in media_of(each.messages))
        if waiting >= BATCH // 4:  # rendered, they take more memory than texts
            yield from flush()
            waiting = 0
    yield from flush()


def _taught(template: ChatTemplate, batch: list[Conversation]) -> list[tuple[list[int], list[bool]]]:
    """Calls `ChatTemplate.taught`; an error names the first conversation that the template refuses."""
    try:
        return template.taught([each.messages for each in batch], [each.tools for each in batch])
    except ValueError as error:
        for each in batch:
            try:
                template.taught([each.messages], [each.tools])
            except ValueError as refused:
                raise ValueError(f"{each.name}: {refused}") from None
        raise error


def _write_split(
    folder: Path,
    split: str,
    encoded: Iterator[Encoded],
    dtype: str,
    shard_tokens: int,
    progress: Callable[[int], None] | None,
) -> Split:
    """Writes all shards of a split."""
    text_bytes, answers = 0, None
    shards: list[Shard] = []

    def counted() -> Iterator[Encoded]:
        nonlocal text_bytes, answers
        for piece in encoded:
            yield piece
            # here the ids have been written: the consumer has asked for the next piece
            text_bytes += piece.size
            if piece.answers is not None:
                answers = (answers or 0) + sum(piece.answers)
            if progress:
                progress(piece.size)

    rest = counted()
    for first in rest:  # `_write_shard` reads from it too: each iteration writes one shard
        target = shard_path(folder, split, len(shards), ".bin")
        shards.append(_write_shard(target, itertools.chain([first], rest), np.dtype(dtype), shard_tokens))
    documents, tokens = sum(shard.documents for shard in shards), sum(shard.tokens for shard in shards)
    return Split(documents, tokens, text_bytes, tuple(shards), answers)


def _write_shard(target: Path, encoded: Iterator[Encoded], dtype: np.dtype, shard_tokens: int) -> Shard:
    """Writes one .bin with its .idx, and .ans for answers, up to `shard_tokens` tokens."""
    tokens = 0
    ends: list[int] = []
    digest, of_answers_digest = hashlib.sha256(), hashlib.sha256()
    rows: dict[str, int] = {}
    of_media: dict[str, tuple[BinaryIO, Any]] = {}
    with open(target, "wb") as file, ExitStack() as more:
        of_answers: BinaryIO | None = None
        for ids, _, last, answers, media in encoded:
            data = np.array(ids, dtype.newbyteorder("<")).tobytes()
            _write(file, data)
            digest.update(data)
            if answers is not None:
                of_answers = of_answers or more.enter_context(open(target.with_suffix(".ans"), "wb"))
                _write(of_answers, bytes(answers))
                of_answers_digest.update(bytes(answers))
            for kind, of_kind, _ in media:
                if kind not in of_media:
                    of_media[kind] = more.enter_context(open(target.with_suffix(f".{kind}"), "wb")), hashlib.sha256()
                for write in (partial(_write, of_media[kind][0]), of_media[kind][1].update):
                    write(np.ascontiguousarray(of_kind, of_kind.dtype.newbyteorder("<")).tobytes())
                rows[kind] = rows.get(kind, 0) + len(of_kind)
            tokens += len(ids)
            if last:
                ends.append(tokens)
                if tokens >= shard_tokens:
                    break
    # Ends are few and stay in memory; ids are written as they come.
    with open(target.with_suffix(".idx"), "wb") as file:
        _write(file, np.array(ends, "<u8").tobytes())
    hashes = {kind: of_kind.hexdigest() for kind, (_, of_kind) in of_media.items()}
    answers_sha256 = of_answers_digest.hexdigest() if of_answers else ""
    return Shard(tokens, len(ends), digest.hexdigest(), answers_sha256, rows or None, hashes or None)


@contextmanager
def _named_as_ours() -> Iterator[None]:
    """Marks OSErrors of this block as write errors, since sources are read meanwhile and may fail too."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        told = OSError(f"cannot write the packed data ({why}): nothing was kept")
        told.errno = error.errno  # set afterwards: passed to the constructor it would precede the message
        raise told from None


def _write(file: BinaryIO, data: bytes) -> None:
    with _named_as_ours():
        file.write(data)
        file.flush()  # so that a full disk raises here and not at close


def _check_shards(path: Path, meta: Meta, verify: bool) -> None:
    """Raises ValueError if a shard is missing or truncated or, with `verify`, its hash differs."""
    item = np.dtype(meta.dtype).itemsize
    for split, held in meta.splits.items():
        if sum(shard.tokens for shard in held.shards) != held.tokens:
            raise ValueError(f"{path}/meta.json is damaged: its {split} shards do not add up, pack the data again")
        for number, shard in enumerate(held.shards):
            sizes = {".bin": shard.tokens * item, ".idx": shard.documents * 8}
            sizes |= {".ans": shard.tokens} if meta.chats else {}
            hashes = {".bin": shard.sha256, ".ans": shard.answers_sha256}
            for kind, count in (shard.rows or {}).items():
                sizes[f".{kind}"] = count * row_type(meta, kind).itemsize
                hashes[f".{kind}"] = (shard.rows_sha256 or {})[kind]
            for suffix, size in sizes.items():
                file = shard_path(path, split, number, suffix)
                got = file.stat().st_size if file.is_file() else None
                if got != size:
                    found = "is missing" if got is None else f"has {got:,} bytes, expected {size:,}"
                    raise ValueError(f"{file} {found}: the copy is incomplete, copy the folder or pack the data again")
            for suffix, digest in hashes.items():
                file = shard_path(path, split, number, suffix)
                if verify and digest and file_sha256(file) != digest:
                    raise ValueError(f"{file} is damaged: its hash differs from that in meta.json, pack the data again")
