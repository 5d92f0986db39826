"""From text to a packed folder in one call: splits off held-out text, finds or learns a tokenizer, packs everything.

prepare("my_texts", "data/mine", vocab_size=8192)
prepare("chats.jsonl", "data/chats", chats=True, tokenizer="runs/mine")
"""

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from retentive.data.chats import Conversation, chat_files, chats
from retentive.data.formats import COMPRESSED
from retentive.data.media import Open, placeholder_id
from retentive.data.pack import Meta, check_free, pieces, write_packed
from retentive.data.sources import Document, documents, source_files
from retentive.data.split import split_documents
from retentive.data.templates import TURNS, ChatTemplate, load_template
from retentive.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, train_bpe
from retentive.files import only_writer

SAMPLE = 64_000_000
"""Maximum number of characters to learn a tokenizer from: more hardly change it."""

Progress = Callable[[str, int, int | None], None]
"""Called repeatedly with the stage, the bytes of text finished in it, and the total if file sizes tell it."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Options of `prepare`: how text becomes training data."""

    tokenizer: str = "train"
    """"train" learns a byte-level BPE. Others: "bytes", a tokenizer.json, a folder with one, a .tiktoken file; on the
    command line also the name of any model."""
    vocab_size: int = 4096
    """Vocabulary size of a learnt tokenizer."""
    valid: str | None = None
    """Separate source for the held-out text, instead of a part of the others."""
    valid_fraction: float = 0.05
    """Fraction of the documents to hold out. Held-out documents stay in memory until the rest is written."""
    on_bad_text: Literal["refuse", "skip"] = "refuse"
    """Refuse or skip documents that are not UTF-8, conversations that are malformed, and conversations that name
    pictures or sounds that cannot be opened."""
    field: str = "text"
    """Field or column that holds the text, in .jsonl, .parquet, .json, .csv, .tsv and hf: sources."""
    suffix: tuple[str, ...] = ()
    """Further kinds of files to read in folders: .json .csv .tsv by their field, others (.tex .log) as plain text,
    "none" for names without a suffix."""
    chats: bool = False
    """Read the sources as conversations (.jsonl .json .parquet: messages, ShareGPT's, Alpaca's, or prompt and
    completion) and train on the answers. Rendered by the chat template beside the tokenizer, or by a plain one."""
    template: Path | None = None
    """Chat template for the conversations, a jinja file."""
    seed: int = 0
    """Seed of the choice of held-out documents."""
    overwrite: bool = False
    """Replace an existing packed folder."""


def prepare(
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    media: Open | None = None,
    encoded: dict[str, dict[str, Any]] | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = warnings.warn,
    advise: bool = True,
    **options: Any,
) -> Meta:
    """Writes the packed folder `out` atomically and returns its meta.

    Args:
        sources: files, folders or hf:NAME (see `sources.documents`), read one after the other.
        media, encoded: function that opens pictures and sounds of conversations, and for each kind the fields of its
            encoder's config except the token; `multimodal.prepare` passes both.
        progress: called with the progress so far.
        say: called with a line about files left out, and about held-out files that are also trained on.
        advise: name options of `retentive data` in error messages.
        options: fields of `DataConfig`.

    Raises:
        ValueError: there is no training text, bytes are not text, or an option is invalid.
        FileExistsError: `out` already holds something.
        OSError: a source is missing or unreadable, `out` cannot be written, or another process is writing it.
    """
    config = DataConfig(**options)
    sources = [sources] if isinstance(sources, str | Path) else list(sources)
    if not sources:
        raise ValueError("`sources` is empty; name files, folders or hf:NAME")
    if config.template is not None and not config.chats:
        raise ValueError("`template`: only conversations have one; set `chats=True`, or leave it out")
    check_free(out, overwrite=config.overwrite)
    report = progress or (lambda stage, done, total: None)
    # First, since missing sources raise here. Learning a tokenizer reads the sources once more.
    train, valid = _splits(sources, config, say, media, advise)
    everything = sources if config.valid is None else [*sources, config.valid]
    with only_writer(Path(out)):
        check_free(out, overwrite=config.overwrite)  # another process may have written it meanwhile
        tokenizer = _tokenizer(sources, config, report, media, advise)
        template = _template(tokenizer, config) if config.chats else None
        rows = {kind: {"token": placeholder_id(kind, tokenizer), **how} for kind, how in (encoded or {}).items()}
        advance = _adding_up(report, "packing", everything, config)
        return write_packed(out, tokenizer, train, valid, progress=advance, template=template, media=rows)


def _splits(
    sources: Sequence[str | Path], config: DataConfig, say: Callable[[str], None], media: Open | None, advise: bool
) -> tuple[Iterator[Any], Iterator[Any]]:
    how: dict[str, Any] = {"on_bad_text": config.on_bad_text, "say": say, "advise": advise}

    def read(source: str | Path) -> Iterator[Document | Conversation]:
        if config.chats:
            return chats(source, media=media, **how)
        return documents(source, field=config.field, suffixes=config.suffix, **how)

    everything = itertools.chain(*[read(source) for source in sources])  # a list, so that missing sources raise now
    if config.valid is not None:
        valid = read(config.valid)
        if both := _files([config.valid], config) & _files(sources, config):
            more = f" and {len(both) - 1:,} more" if len(both) > 1 else ""
            say(f"trained on and held out as well: {min(both)}{more}; held-out scores will be too good")
        return everything, valid
    return split_documents(everything, config.valid_fraction, config.seed)


def _files(sources: Sequence[str | Path], config: DataConfig) -> set[Path]:
    """Returns the files of all local sources, with links resolved."""
    local = [source for source in sources if not str(source).startswith("hf:")]
    return {path.resolve() for source in local for path in _read_files(source, config)}


def _read_files(source: str | Path, config: DataConfig) -> list[Path]:
    """Returns the files that are read of a local source."""
    return list((chat_files(source) if config.chats else source_files(source, config.suffix)).values())


def _tokenizer(
    sources: Sequence[str | Path], config: DataConfig, report: Progress, media: Open | None, advise: bool
) -> Tokenizer:
    """Returns the tokenizer that the config names, or learns one from the training text."""
    if config.tokenizer != "train":
        return load_tokenizer(config.tokenizer)
    train, _ = _splits(sources, config, lambda remark: None, media, advise)  # held-out text stays unseen
    hub = any(str(source).startswith("hf:") for source in sources)
    if config.chats:  # include the template's own words, which are in every conversation
        template = _template(ByteTokenizer(), config)
        texts = (text for conversation in train for text in _spelt(template, conversation))
    else:
        texts = (piece for document in train for piece in pieces(document.text))
    sample = _sample(texts, _adding_up(report, "reading a sample", sources, config), all_of_it=not hub)
    report("learning a tokenizer", 0, None)
    return train_bpe(sample, config.vocab_size)


def _template(tokenizer: Tokenizer, config: DataConfig) -> ChatTemplate:
    """Returns the config's template, the one beside the tokenizer, or the plain one for training on chats."""
    beside = Path(config.tokenizer)
    folder = beside if beside.is_dir() else beside.parent
    template = load_template(folder, tokenizer, config.template, default=TURNS)
    try:  # check it with a minimal conversation
        template.taught([[{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]])
    except ValueError as error:
        raise ValueError(f"{config.template or f'the template in {folder}'}: {error}") from None
    return template


def _spelt(template: ChatTemplate, conversation: Conversation) -> list[str]:
    """Calls `ChatTemplate.texts`; errors name the conversation."""
    try:
        return template.texts(conversation.messages, conversation.tools)
    except ValueError as error:
        raise ValueError(f"{conversation.name}: {error}") from None


def _sample(texts: Iterator[str], advance: Callable[[int], None], all_of_it: bool) -> list[str]:
    """Samples at most SAMPLE characters: evenly from all texts, or the first ones if they are downloaded."""
    sample: list[str] = []
    size, stride = 0, 1
    for seen, text in enumerate(texts):
        advance(len(text.encode()))
        if seen % stride == 0:
            sample.append(text)
            size += len(text)
        if size > SAMPLE and not all_of_it:
            return sample
        while size > SAMPLE and len(sample) > 1:  # drop every other text, and skip more from here on
            sample, stride = sample[::2], stride * 2
            size = sum(map(len, sample))
    return sample


def _adding_up(
    report: Progress, stage: str, sources: Sequence[str | Path], config: DataConfig
) -> Callable[[int], None]:
    """Returns a function that takes the bytes of each step and reports their sum."""
    total = _bytes_of(sources, config)
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        report(stage, done, total)

    return advance


def _bytes_of(sources: Sequence[str | Path], config: DataConfig) -> int | None:
    """Returns the bytes of text in the sources; None if the files' sizes do not tell."""
    size = 0
    for source in sources:
        if str(source).startswith("hf:"):
            return None
        for path in _read_files(source, config):
            if path.suffix.lower() in (*COMPRESSED, ".parquet"):
                return None
            size += path.stat().st_size
    return size
