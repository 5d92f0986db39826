"""`retentive data`: a source of text becomes a packed folder that `retentive train` reads."""

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from retentive.data.pack import Meta, check_free, pack, pieces, split_documents
from retentive.data.sources import COMPRESSED, Document, documents, source_files
from retentive.data.tokenizer import Tokenizer, load_tokenizer, train_bpe

SAMPLE = 64_000_000
"""Characters that a new tokenizer is learnt from, at most: more of them hardly changes it."""


@dataclass(frozen=True)
class DataConfig:
    """Turn text into a folder of training data: learn or load a tokenizer, encode, hold some text out."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """A file or folder (.txt .md .py .rst .html .jsonl .parquet, also compressed), or hf:NAME[:SPLIT]."""
    out: Path
    """The folder to write."""
    tokenizer: str = "train"
    """"train" learns a byte-level BPE; or "bytes", a tokenizer.json, a folder with one, a .tiktoken file."""
    vocab_size: int = 4096
    """Tokens of the tokenizer that is learnt."""
    valid: str | None = None
    """A source of its own for the held-out text, instead of a part of the first."""
    valid_fraction: float = 0.05
    """The part of the documents that is held out; it waits in memory while the rest is written."""
    on_bad_text: Literal["refuse", "skip"] = "refuse"
    """What to do with documents that are not UTF-8."""
    field: str = "text"
    """The field or column that holds the text, in .jsonl, .parquet and hf: sources."""
    seed: int = 0
    """Chooses which documents are held out."""
    overwrite: bool = False
    """Replace an earlier packed folder."""


def prepare(config: DataConfig) -> Path:
    """Packs what `config` asks for, reports on the terminal, and returns the folder."""
    check_free(config.out, overwrite=config.overwrite)
    console = Console()
    with _progress(console) as progress:
        tokenizer, origin = _tokenizer(config, progress)
        task = progress.add_task("packing", total=_source_bytes(config))
        train, valid = _splits(config)
        meta = pack(
            config.out,
            tokenizer,
            train,
            valid,
            overwrite=config.overwrite,
            progress=lambda size: progress.advance(task, size),
        )
    _summary(console, config, meta, origin)
    return config.out


def main(argv: list[str]) -> None:
    """`retentive data ARGV`."""
    prepare(tyro.cli(DataConfig, prog="retentive data", description=DataConfig.__doc__, args=argv))


def _splits(config: DataConfig) -> tuple[Iterator[Document], Iterator[Document]]:
    def read(source: str) -> Iterator[Document]:
        return documents(source, on_bad_text=config.on_bad_text, field=config.field)

    if config.valid is not None:
        return read(config.source), read(config.valid)
    return split_documents(read(config.source), config.valid_fraction, config.seed)


def _tokenizer(config: DataConfig, progress: Progress) -> tuple[Tokenizer, str]:
    if config.tokenizer != "train":
        return load_tokenizer(config.tokenizer), config.tokenizer
    task = progress.add_task("reading a sample", total=_source_bytes(config))
    train, _ = _splits(config)  # held-out text stays unseen
    sample = _sample(train, lambda size: progress.advance(task, size), all_of_it=not config.source.startswith("hf:"))
    progress.update(task, description="learning a tokenizer", total=None)
    tokenizer = train_bpe(sample, config.vocab_size)
    progress.remove_task(task)
    return tokenizer, f"learnt from {sum(map(len, sample)) / 1e6:.1f} M characters"


def _sample(train: Iterator[Document], progress: Callable[[int], None], all_of_it: bool) -> list[str]:
    """Pieces from all over the text, or its beginning where reading it all would mean to download it."""
    sample: list[str] = []
    size = seen = 0
    stride = 1
    for document in train:
        for piece in pieces(document.text):
            progress(len(piece))
            if seen % stride == 0:
                sample.append(piece)
                size += len(piece)
            seen += 1
            if size > SAMPLE and not all_of_it:
                return sample
            while size > SAMPLE and len(sample) > 1:  # keep every other piece, now and from here on
                sample, stride = sample[::2], stride * 2
                size = sum(map(len, sample))
    return sample


def _source_bytes(config: DataConfig) -> int | None:
    """The size of what will be read, where the files tell."""
    size = 0
    for source in filter(None, (config.source, config.valid)):
        if source.startswith("hf:"):
            return None
        for path in source_files(source).values():
            if path.suffix.lower() in (*COMPRESSED, ".parquet"):
                return None
            size += path.stat().st_size
    return size


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _summary(console: Console, config: DataConfig, meta: Meta, origin: str) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("split", "documents", "tokens", "MB of text", "bytes/token", "shards"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for name, split in meta.splits.items():
        ratio = f"{split.bytes / split.tokens:.2f}" if split.tokens else "-"
        numbers = (
            f"{split.documents:,}",
            f"{split.tokens:,}",
            f"{split.bytes / 1e6:,.2f}",
            ratio,
            f"{len(split.shards)}",
        )
        table.add_row(name, *numbers)
    size = sum(file.stat().st_size for file in config.out.iterdir())
    console.print(f"{config.out}  {size / 1e6:,.1f} MB", style="bold", markup=False, highlight=False)
    console.print(f"tokenizer: {meta.vocab_size:,} tokens, {origin}", markup=False, highlight=False)
    console.print(table)
    todo = f"next: retentive train --data {shlex.quote(str(config.out))} --size 5m --out runs/mine"
    console.print(todo, markup=False, highlight=False, soft_wrap=True)
