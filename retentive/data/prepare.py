"""From text to a folder that training reads, in one call: text is held out, a tokenizer found, and all of it packed.

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
"""Characters that a new tokenizer is learnt from, at most: more of them hardly change it."""

Progress = Callable[[str, int, int | None], None]
"""Called again and again with the stage, the bytes of text done in it, and their number if the files' sizes say it."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Options of `prepare`: how text becomes training data."""

    tokenizer: str = "train"
    """"train" learns a byte-level BPE; or "bytes", a tokenizer.json, a folder with one, a .tiktoken file."""
    vocab_size: int = 4096
    """Tokens of the tokenizer that is learnt."""
    valid: str | None = None
    """A source of its own for the held-out text, instead of a part of the others."""
    valid_fraction: float = 0.05
    """The part of the documents that is held out; it waits in memory while the rest is written."""
    on_bad_text: Literal["refuse", "skip"] = "refuse"
    """What to do with documents that are not UTF-8, and with conversations that are none or that name pictures and
    sounds which cannot be opened."""
    field: str = "text"
    """The field or column that holds the text, in .jsonl, .parquet, .json, .csv, .tsv and hf: sources."""
    suffix: tuple[str, ...] = ()
    """More kinds of files to read in folders: .json .csv .tsv by their field, others (.tex .log) as plain text; none
    stands for names without a suffix."""
    chats: bool = False
    """The sources are conversations (.jsonl .json .parquet: messages, ShareGPT's, or prompt and completion), whose
    answers are trained on; they are spelt by the chat template beside the tokenizer, or by a plain one."""
    template: Path | None = None
    """Another chat template for them, a file of jinja."""
    seed: int = 0
    """Chooses which documents are held out."""
    overwrite: bool = False
    """Replace an earlier packed folder."""


def prepare(
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    media: Open | None = None,
    encoded: dict[str, dict[str, Any]] | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = warnings.warn,
    **options: Any,
) -> Meta:
    """The meta of the packed folder `out`, once written: whole, or nothing of it.

    Args:
        sources: files, folders or hf:NAME (see `sources.documents`), read one after the other.
        media, encoded: what opens the pictures and sounds of conversations, and for each kind how they become rows
            (fields of its encoder's config but for the token); `multimodal.prepare` hands them in.
        progress: called with how far it is.
        say: called with a line on what is left out of the sources, and on held-out files that are trained on too.
        options: fields of `DataConfig`.

    Raises:
        ValueError: nothing to train on, bytes that are not text, an impossible option.
        FileExistsError: `out` holds something already.
        OSError: a source is missing or unreadable, `out` cannot be written, or another process is writing it.
    """
    config = DataConfig(**options)
    sources = [sources] if isinstance(sources, str | Path) else list(sources)
    if not sources:
        raise ValueError("no source: expected files, folders or hf:NAME")
    if config.template is not None and not config.chats:
        raise ValueError("--template is for conversations: add --chats")
    check_free(out, overwrite=config.overwrite)
    report = progress or (lambda stage, done, total: None)
    # First of all, since missing sources raise here. Learning a tokenizer reads the sources once more.
    train, valid = _splits(sources, config, say, media)
    everything = sources if config.valid is None else [*sources, config.valid]
    with only_writer(Path(out)):
        check_free(out, overwrite=config.overwrite)  # another process may have been quicker
        tokenizer = _tokenizer(sources, config, report, media)
        template = _template(tokenizer, config) if config.chats else None
        rows = {kind: {"token": placeholder_id(kind, tokenizer), **how} for kind, how in (encoded or {}).items()}
        advance = _adding_up(report, "packing", everything, config)
        return write_packed(out, tokenizer, train, valid, progress=advance, template=template, media=rows)


def _splits(
    sources: Sequence[str | Path], config: DataConfig, say: Callable[[str], None], media: Open | None = None
) -> tuple[Iterator[Any], Iterator[Any]]:
    def read(source: str | Path) -> Iterator[Document | Conversation]:
        if config.chats:
            return chats(source, media=media, on_bad_text=config.on_bad_text, say=say)
        return documents(source, on_bad_text=config.on_bad_text, field=config.field, suffixes=config.suffix, say=say)

    everything = itertools.chain(*[read(source) for source in sources])  # a list: what is missing raises now, not later
    if config.valid is not None:
        valid = read(config.valid)
        if both := _files([config.valid], config) & _files(sources, config):
            more = f" and {len(both) - 1:,} more" if len(both) > 1 else ""
            say(f"trained on and held out as well: {min(both)}{more}; held-out scores will be too good")
        return everything, valid
    return split_documents(everything, config.valid_fraction, config.seed)


def _files(sources: Sequence[str | Path], config: DataConfig) -> set[Path]:
    """The files of the sources, those of the hub left out; links are followed."""
    local = [source for source in sources if not str(source).startswith("hf:")]
    return {path.resolve() for source in local for path in _read_files(source, config)}


def _read_files(source: str | Path, config: DataConfig) -> list[Path]:
    """The files that are read of a local source."""
    return list((chat_files(source) if config.chats else source_files(source, config.suffix)).values())


def _tokenizer(sources: Sequence[str | Path], config: DataConfig, report: Progress, media: Open | None) -> Tokenizer:
    """The tokenizer that the config names, or one that is learnt from the text to train on."""
    if config.tokenizer != "train":
        return load_tokenizer(config.tokenizer)
    train, _ = _splits(sources, config, lambda remark: None, media)  # held-out text stays unseen
    hub = any(str(source).startswith("hf:") for source in sources)
    if config.chats:  # the template's own words too: they are in every conversation
        template = _template(ByteTokenizer(), config)
        texts = (text for conversation in train for text in _spelt(template, conversation))
    else:
        texts = (piece for document in train for piece in pieces(document.text))
    sample = _sample(texts, _adding_up(report, "reading a sample", sources, config), all_of_it=not hub)
    report("learning a tokenizer", 0, None)
    return train_bpe(sample, config.vocab_size)


def _template(tokenizer: Tokenizer, config: DataConfig) -> ChatTemplate:
    """The config's template, or the one beside the tokenizer, or the plain one that chats are taught with."""
    beside = Path(config.tokenizer)
    folder = beside if beside.is_dir() else beside.parent
    template = load_template(folder, tokenizer, config.template, default=TURNS)
    try:  # whatever the conversations are
        template.taught([[{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]])
    except ValueError as error:
        raise ValueError(f"{config.template or f'the template in {folder}'}: {error}") from None
    return template


def _spelt(template: ChatTemplate, conversation: Conversation) -> list[str]:
    """`ChatTemplate.texts`, whose errors name the conversation."""
    try:
        return template.texts(conversation.messages)
    except ValueError as error:
        raise ValueError(f"{conversation.name}: {error}") from None


def _sample(texts: Iterator[str], advance: Callable[[int], None], all_of_it: bool) -> list[str]:
    """Some of the texts, SAMPLE characters at most: from all over them, or the first where they are downloaded."""
    sample: list[str] = []
    size, stride = 0, 1
    for seen, text in enumerate(texts):
        advance(len(text.encode()))
        if seen % stride == 0:
            sample.append(text)
            size += len(text)
        if size > SAMPLE and not all_of_it:
            return sample
        while size > SAMPLE and len(sample) > 1:  # keep every other text, now and from here on
            sample, stride = sample[::2], stride * 2
            size = sum(map(len, sample))
    return sample


def _adding_up(
    report: Progress, stage: str, sources: Sequence[str | Path], config: DataConfig
) -> Callable[[int], None]:
    """A function that takes the bytes of each step, and reports their sum."""
    total = _bytes_of(sources, config)
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        report(stage, done, total)

    return advance


def _bytes_of(sources: Sequence[str | Path], config: DataConfig) -> int | None:
    """The bytes of text in the sources; None where the files' sizes do not say it."""
    size = 0
    for source in sources:
        if str(source).startswith("hf:"):
            return None
        for path in _read_files(source, config):
            if path.suffix.lower() in (*COMPRESSED, ".parquet"):
                return None
            size += path.stat().st_size
    return size
