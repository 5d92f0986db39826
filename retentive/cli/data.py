"""`retentive data`: pack sources of text into a folder that `retentive train` reads."""

import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, TextIO

import tyro
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeElapsedColumn, TransferSpeedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from retentive.checkpoint import ModelFolder
from retentive.checkpoint.find import REMOTE, shipped
from retentive.checkpoint.gguf import SUFFIX
from retentive.checkpoint.save import save_words
from retentive.cli.errors import flags
from retentive.cli.parsing import check_once, parse, typed_options
from retentive.data.media import KINDS
from retentive.data.pack import Meta
from retentive.data.prepare import SAMPLE, DataConfig, Progress, prepare
from retentive.models.encoders import ImageConfig, config_for
from retentive.train import TrainRun

HEADINGS = {"image": "pictures", "audio": "sound"}
"""Headings of the kinds in the table of packed data."""


@dataclass(frozen=True)
class DataCommand:
    """Pack text into a folder of training data: learn or load a tokenizer, encode, and hold some text out."""

    sources: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SOURCES")]
    """Files or folders (.txt .md .py .rst .html .jsonl .parquet, also compressed), or hf:NAME[:SPLIT]."""
    out: Path
    """Folder to write."""
    image: Mapping[str, Any] = field(default_factory=dict)
    """Pack the conversations' pictures, by default with size=64 patch=8 channels=3. If neither this nor --audio is
    given, the encoders of the model of --tokenizer decide."""
    audio: Mapping[str, Any] = field(default_factory=dict)
    """Pack the conversations' sound, by default with rate=16000 (Hz) mels=40 window=25 hop=10 (ms) stack=4."""
    config: Annotated[DataConfig, tyro.conf.arg(name="")] = field(default_factory=DataConfig)


def main(argv: list[str]) -> None:
    """`retentive data ARGV`."""
    command = parse(DataCommand, "retentive data", argv, description=DataCommand.__doc__)
    check_once(argv, *KINDS)
    given = typed_options(argv)
    media = {kind: numbers(kind, getattr(command, kind)) for kind in KINDS if kind in given}
    if media and not command.config.chats:
        raise ValueError(f"--{next(iter(media))} needs conversations: add --chats")
    folder = Path(command.config.tokenizer)
    if not media and command.config.chats and (folder / "config.json").is_file() and ModelFolder.open(folder).encoders:
        from retentive.multimodal import fields_of

        media = fields_of(folder)
    console = Console()

    def say(remark: str) -> None:
        console.print(flags(remark, "data"), markup=False, highlight=False, soft_wrap=True)

    options = vars(command.config)
    try:
        with shown(sys.stdout) as progress, words_of(command.config.tokenizer) as words:
            options = options | {"tokenizer": words}
            if media:
                from retentive import multimodal

                options = {name: value for name, value in options.items() if name != "chats"} | media
                meta = multimodal.prepare(command.sources, command.out, progress=progress, say=say, **options)
            else:
                meta = prepare(command.sources, command.out, progress=progress, say=say, **options)
    except KeyboardInterrupt:
        say("interrupted: nothing was written")
        raise
    _summary(console, command, meta)


@contextmanager
def shown(file: TextIO) -> Iterator[Progress]:
    """Yield a function that draws a progress bar on a terminal, one for each stage."""
    console = Console(file=file)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None)

        def show(stage: str, done: int, total: int | None) -> None:
            if stage != bar.tasks[0].description:  # a new stage starts at zero and with a new clock
                bar.reset(task, description=stage, total=total)
            bar.update(task, completed=done, total=total)

        yield show


def numbers(kind: str, items: Iterable[str]) -> dict[str, int]:
    """Return the fields of FIELD=VALUE items; raises ValueError for a value that is not a whole number."""
    found = {}
    for item in items:
        name, _, text = item.partition("=")
        if not text.removeprefix("-").isdecimal() or name in found:
            example = {"image": "size=64", "audio": "rate=16000"}[kind]
            raise ValueError(f"--{kind} {item}: expected each FIELD=NUMBER once, as in {example}")
        found[name] = int(text)
    return found


@contextmanager
def words_of(tokenizer: str) -> Iterator[str]:
    """Yield the tokenizer as `prepare` takes it: of a model that is no folder of ours, a folder with its words."""
    named = tokenizer.startswith(REMOTE) or tokenizer.lower().endswith(SUFFIX)
    if not named and (Path(tokenizer).exists() or tokenizer not in shipped()):
        yield tokenizer
        return
    folder = ModelFolder.open(tokenizer)
    with tempfile.TemporaryDirectory() as made:
        save_words(Path(made), folder.tokenizer_for_text(), folder.template_source)
        yield made


def _summary(console: Console, command: DataCommand, meta: Meta) -> None:
    """Print what was packed, and the next command."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    senses = {kind: of_rows(kind, how) for kind, how in (meta.media or {}).items()}
    seen = [HEADINGS[kind] for kind in senses]
    for heading in ("split", "documents", "tokens", *seen, "text", "bytes/token", "shards"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for name, split in meta.splits.items():
        rows = {kind: sum((shard.rows or {}).get(kind, 0) for shard in split.shards) for kind in senses}
        read = split.tokens - sum(rows.values())  # as text
        ratio = f"{split.bytes / read:.2f}" if read else "-"
        counts = (f"{split.documents:,}", f"{split.tokens:,}", *(senses[kind](n) for kind, n in rows.items()))
        table.add_row(name, *counts, decimal(split.bytes), ratio, f"{len(split.shards)}")
    origin = command.config.tokenizer
    if origin == "train":
        text = meta.splits["train"].bytes
        origin = f"learnt from {decimal(text) if text <= SAMPLE else f'a sample of {decimal(text)}'}"
    packed = sum(file.stat().st_size for file in command.out.iterdir())
    console.print(f"{command.out}  {decimal(packed)}", style="bold", markup=False, highlight=False)
    console.print(f"tokenizer: {meta.vocab_size:,} tokens, {origin}", markup=False, highlight=False)
    console.print(table)
    if meta.splits["train"].tokens <= TrainRun.length:
        return  # less than one row: training needs a smaller --length
    todo = f"next: retentive train --data {shlex.quote(str(command.out))} --size 5m --out runs/mine"
    if meta.chats:
        mode = "whole" if meta.media else "carry"
        todo += f" --mode {mode}, or retentive sft RUN --data {shlex.quote(str(command.out))} --out runs/mine"
    console.print(todo, markup=False, highlight=False, soft_wrap=True)


def of_rows(kind: str, how: Mapping[str, Any]) -> Callable[[int], str]:
    """Return a function that writes a number of rows as pictures, or as hours, minutes and seconds of sound."""
    config = config_for(kind, how)
    if isinstance(config, ImageConfig):
        return lambda rows: f"{rows // config.tokens:,}"
    return lambda rows: str(timedelta(seconds=round(rows / config.tokens_per_second)))
