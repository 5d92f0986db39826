"""`retentive memory write|ask|merge|show`: read once, keep what was read as one file, ask it any number of times."""

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from retentive.cli.loading import Loading
from retentive.data.pack import pieces
from retentive.data.sources import Document, documents, source_files
from retentive.data.tokenizer import Tokenizer
from retentive.infer import SamplingParams, write_on
from retentive.infer.memory import Memory, blank, chain, chain_errors, load_memory, merge, read, save, show
from retentive.models import Model

SHOWN = 20
"""Documents that are listed by name."""


@dataclass(frozen=True, kw_only=True)
class WriteCommand(Loading):
    """Read documents of any length into one memory file. Ctrl-C keeps what was read: the same command goes on."""

    files: tyro.conf.Positional[tuple[str, ...]]
    """Files or folders (.txt .md .py .rst .html .jsonl .parquet, also compressed), read in this order."""
    out: Path
    """The file to write."""
    memory: Path | None = None
    """A memory to go on from; --out may be the same file."""
    separate: bool = False
    """Read each document for itself and merge them, so that all are equally near: structured prompting. Ctrl-C
    then keeps nothing."""


@dataclass(frozen=True, kw_only=True)
class AskCommand(Loading):
    """Write on from a prompt after all that a memory has read. What that takes does not depend on how much it was."""

    memory: Path
    """The memory file."""
    prompt: str
    """What to go on from; - reads standard input."""
    max_tokens: int = 200
    """Tokens to write at most."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not printed."""
    sampling: Annotated[SamplingParams, tyro.conf.arg(name="")] = field(
        default_factory=lambda: SamplingParams(temperature=0.8, top_p=0.95)
    )


@dataclass(frozen=True)
class MergeCommand:
    """One memory out of several of the same model, all equally near to what is asked: structured prompting."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """Memory files, two or more."""
    out: Path
    """The file to write."""
    chain: bool = False
    """One after the other instead, as if they had been read in a row: exact in the first layer."""
    against: Path | None = None
    """A memory that has read the same documents in a row: tells how far each layer is from it."""


@dataclass(frozen=True)
class ShowCommand:
    """What is in a memory file."""

    file: tyro.conf.Positional[Path]
    """The memory file."""


VERBS = {"write": WriteCommand, "ask": AskCommand, "merge": MergeCommand, "show": ShowCommand}


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: retentive memory VERB [OPTIONS]\n")
        for name, cls in VERBS.items():
            print(f"  {name:<6} {cls.__doc__}")
        return
    if argv[0] not in VERBS:
        raise ValueError(f"unknown memory verb {argv[0]!r}, expected one of {', '.join(VERBS)}")
    command: Any = tyro.cli(VERBS[argv[0]], prog=f"retentive memory {argv[0]}", args=argv[1:])
    if isinstance(command, WriteCommand):
        write(command)
    elif isinstance(command, AskCommand):
        ask(command)
    elif isinstance(command, MergeCommand):
        merge_files(command)
    else:
        print(described(show(command.file), command.file))


# write


def write(command: WriteCommand) -> None:
    """Read the files and save the memory; on Ctrl-C, what was read so far beside it."""
    if not command.files:
        raise ValueError("write needs files to read: retentive memory write RUN FILES… --out FILE")
    if command.out.exists() and command.out != command.memory:
        raise FileExistsError(f"{command.out} exists: choose another file, nothing is overwritten")
    if command.separate and command.memory:
        raise ValueError("--separate and --memory exclude each other: write apart, then retentive memory merge")
    for file in command.files:
        if not file.startswith("hf:"):
            source_files(file)  # what is missing is said before anything is read
    model, tokenizer = command.load()
    before = blank(model)
    if command.memory:
        before = load_memory(command.memory, model, before.model)
    if command.separate:
        merge([before])  # a model whose memories cannot be merged is refused before anything is read
    texts = (document for file in command.files for document in documents(file))
    command.out.parent.mkdir(parents=True, exist_ok=True)
    place = command.out.with_name(command.out.name + ".unfinished")
    if command.separate:
        memory = apart(model, tokenizer, before.model, texts)
    else:
        memory = in_a_row(model, tokenizer, before, texts, place)
    save(memory, command.out)
    place.unlink(missing_ok=True)
    print(described(show(command.out), command.out))


def in_a_row(model: Model, tokenizer: Tokenizer, before: Memory, texts: Iterable[Document], place: Path) -> Memory:
    """`before`, and then all documents; goes on from the file at `place`, which Ctrl-C writes, if there is one."""
    known: list[str] = []
    sources: list[dict] = []
    start = before
    if place.exists():
        start = load_memory(place, model, before.model)
        if start.sources[: len(before.sources)] != before.sources:
            raise ValueError(f"{place} went on from another memory: give the same --memory, or delete it")
        known = [source["sha256"] for source in start.sources[len(before.sources) :]]
        print(f"going on after {start.tokens:,} tokens ({place})", file=sys.stderr)
    skip = start.tokens - before.tokens - len(before.pending) if start is not before else 0
    ids = after(skip, encoded(texts, tokenizer, sources))
    memory = start
    try:
        with progress() as tell:
            for memory in read(model, ids, start):
                check_same(sources, known, place)
                tell(memory.tokens)
        check_same(sources, known, place, whole=True)
    except KeyboardInterrupt:
        if memory is not start:
            memory.sources = before.sources + sources
            save(memory, place)
            print(f"read {memory.tokens:,} tokens, kept in {place}: the same command goes on", file=sys.stderr)
        raise
    memory.sources = before.sources + sources
    return memory


def apart(model: Model, tokenizer: Tokenizer, name: str, texts: Iterable[Document]) -> Memory:
    """The documents read each for itself and merged; and in a row too, which tells the layers' errors."""
    parts: list[Memory] = []
    whole = blank(model, name)
    with progress() as tell:
        for document in texts:
            part = blank(model, name)
            for read_on in read(model, encoded([document], tokenizer, part.sources), part):
                part = read_on
            parts.append(part)
            for read_on in read(model, encoded([document], tokenizer, whole.sources), whole):
                whole = read_on
            tell(whole.tokens)
    memory = merge(parts)
    if whole.config["decay"] != "gated":  # there is no chain then
        memory.errors = chain_errors(parts, whole)
    return memory


def encoded(texts: Iterable[Document], tokenizer: Tokenizer, sources: list[dict]) -> Iterator[list[int]]:
    """The ids of all documents in pieces, each document after an end of text, as in training; notes it in `sources`."""
    for document in texts:
        digest = hashlib.sha256(document.text.encode()).hexdigest()
        source = {"name": document.name, "tokens": 0, "sha256": digest}
        sources.append(source)
        begin = [tokenizer.eos_id]
        for piece in pieces(document.text):
            ids = begin + tokenizer.encode(piece)
            source["tokens"] += len(ids)
            begin = []
            yield ids


def after(count: int, pieces: Iterable[list[int]]) -> Iterator[list[int]]:
    """What comes after the first `count` ids."""
    for ids in pieces:
        if count < len(ids):
            yield ids[count:]
        count = max(count - len(ids), 0)


def check_same(sources: list[dict], known: list[str], place: Path, *, whole: bool = False) -> None:
    """Refuses to go on from what was read of other documents."""
    hashes = [source["sha256"] for source in sources[: len(known)]]
    if hashes != (known if whole else known[: len(hashes)]):
        raise ValueError(f"{place} has read other documents: give the same files in the same order, or delete it")


@contextmanager
def progress() -> Iterator[Callable[[int], None]]:
    """A function that shows how many tokens were read, on a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("reading {task.completed:,.0f} tokens, {task.fields[speed]:,.0f} tokens/s"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, speed=0.0)
        yield lambda tokens: bar.update(task, completed=tokens, speed=bar.tasks[0].speed or 0.0)


# ask, merge, show


def ask(command: AskCommand) -> None:
    """Print the prompt and what the model makes of it after what the memory has read, as it comes."""
    if command.max_tokens < 1:
        raise ValueError(f"--max-tokens must be at least 1, got {command.max_tokens}")
    prompt = sys.stdin.read() if command.prompt == "-" else command.prompt
    if not prompt:
        raise ValueError("ask needs a prompt: --prompt TEXT, or --prompt - to read standard input")
    model, tokenizer = command.load()
    memory = load_memory(command.memory, model)
    for text in write_on(
        model,
        tokenizer,
        prompt,
        command.sampling,
        max_tokens=command.max_tokens,
        stop=command.stop,
        state=memory.state,
        pending=memory.pending,
    ):
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")


def merge_files(command: MergeCommand) -> None:
    """Merge memory files into a new one."""
    if len(command.files) < 2:
        raise ValueError(f"merge needs two memory files or more, got {len(command.files)}")
    if command.out.exists():
        raise FileExistsError(f"{command.out} exists: choose another file, nothing is overwritten")
    memories = [load_memory(file) for file in command.files]
    memory = chain(memories) if command.chain else merge(memories)
    if command.against:
        memory.errors = chain_errors(memories, load_memory(command.against))
    command.out.parent.mkdir(parents=True, exist_ok=True)
    save(memory, command.out)
    print(described(show(command.out), command.out))


def described(about: dict[str, Any], path: Path) -> str:
    """What `show` found, for reading."""
    config, sources = about["config"], about["sources"]
    lines = [
        f"{path}: {about['tokens']:,} tokens of {len(sources)} documents, position {about['position']:,}",
        f"  {about['state_bytes'] / 1e6:.2f} MB of state ({about['kind']}), {about['file_bytes'] / 1e6:.2f} MB of file",
        f"  model {about['model']}" + (f", {config['layers']} layers, width {config['dim']}" if config else ""),
    ]
    if about["pending"]:
        lines.append(f"  still to be read: {about['pending']}")
    for source in sources[:SHOWN]:
        part = f", part {source['part']}" if "part" in source else ""
        lines.append(f"    {source['name']}: {source['tokens']:,} tokens{part}, sha256 {source['sha256'][:12]}")
    if len(sources) > SHOWN:
        lines.append(f"    and {len(sources) - SHOWN} more")
    if about["errors"]:
        lines.append("  read apart, not in a row; what that changed in each layer's state (relative, parts in order):")
        lines.append("    " + "  ".join(f"{error:.2g}" for error in about["errors"]))
    return "\n".join(lines)
