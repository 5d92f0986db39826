"""`retentive memory write|ask|merge|show`: read documents once into a file, and ask it many times."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from retentive.cli.loading import Loading
from retentive.cli.parsing import parse
from retentive.cli.progress import Lines, say
from retentive.cli.typing_out import prompt_text, type_out
from retentive.data.media import SUFFIXES
from retentive.infer import SamplingParams, media, reading
from retentive.infer.memory import head, load_memory, save, show
from retentive.infer.merge import merge_files
from retentive.infer.writing import stream_generate
from retentive.sampling import TEXT
from retentive.tables import counted

SHOWN = 20
"""Maximum number of documents listed by name."""


@dataclass(frozen=True, kw_only=True)
class WriteCommand(Loading):
    """Read documents of any length into one memory file. After Ctrl-C the same command continues, but with pictures
    or sounds it starts again."""

    files: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="FILES")]
    """Files or folders (.txt .md .py .rst .html .jsonl .parquet, also compressed), read in this order. For a model
    that sees or hears: only pictures and sounds (.png .jpg .webp .wav .flac .ogg)."""
    out: Path
    """File to write."""
    memory: Path | None = None
    """Memory file to continue with text; --out may be the same file."""
    separate: bool = False
    """Read each document separately and merge them, so that each counts as if it were the last (structured prompting).
    Ctrl-C then keeps nothing."""


@dataclass(frozen=True, kw_only=True)
class AskCommand(Loading):
    """Generate text after a prompt, from a memory file. The cost does not depend on how much the memory has read."""

    memory: Path
    """Memory file."""
    prompt: str
    """Text to continue; - reads standard input."""
    max_tokens: int = 200
    """Maximum tokens to generate."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not printed."""
    sampling: Annotated[SamplingParams, tyro.conf.arg(name="")] = TEXT


@dataclass(frozen=True)
class MergeCommand:
    """Merge memories of the same model, so that each counts as if it were the last (structured prompting)."""

    files: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FILES")]
    """Memory files, two or more."""
    out: Path
    """File to write."""
    chain: bool = False
    """Join the memories in order, as if read one after another; only the first layer is exact."""
    against: Path | None = None
    """Memory that has read the same documents in a row, to print each layer's difference from it."""


@dataclass(frozen=True)
class ShowCommand:
    """Show the content of a memory file."""

    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """Memory file."""


VERBS = {"write": WriteCommand, "ask": AskCommand, "merge": MergeCommand, "show": ShowCommand}


def main(argv: list[str]) -> None:
    """`retentive memory ARGV`: four verbs, each with its own --help."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: retentive memory COMMAND [OPTIONS]    (retentive memory COMMAND --help lists its options)\n")
        for name, cls in VERBS.items():
            print(f"  {name:<6} {' '.join(str(cls.__doc__).split())}")
        return
    if argv[0] not in VERBS:
        raise ValueError(f"unknown memory verb {argv[0]!r}, expected one of {', '.join(VERBS)}")
    command: Any = parse(VERBS[argv[0]], f"retentive memory {argv[0]}", argv[1:])
    if isinstance(command, WriteCommand):
        write(command)
    elif isinstance(command, AskCommand):
        ask(command)
    elif isinstance(command, MergeCommand):
        merge_files(command.files, command.out, in_a_chain=command.chain, against=command.against)
        print(described(show(command.out), command.out))
    else:
        print(described(show(command.file), command.file))


def write(command: WriteCommand) -> None:
    """Read the files and save the memory, showing progress."""
    if any(Path(file).suffix.lower() in SUFFIXES for file in command.files):
        write_media(command)
        return
    # before loading the model, which may take a minute
    reading.check(command.files, command.out, memory=command.memory, separate=command.separate)
    model, tokenizer = command.load()
    kept = reading.unfinished(command.out)
    if kept.exists() and not command.separate:
        say(f"going on after {counted(head(kept)['tokens'], 'token')} ({kept})")
    how: dict[str, Any] = {"memory": command.memory, "separate": command.separate}
    try:
        with sigterm_is_ctrl_c(), shown() as progress:
            reading.write_memory(model, tokenizer, command.files, command.out, **how, progress=progress, say=say)
    except KeyboardInterrupt:
        if kept.exists() and not command.separate:
            read = head(kept)["tokens"]
            say(f"read {counted(read, 'token')}, kept in {kept}: the same command goes on")
        raise
    print(described(show(command.out), command.out))


def write_media(command: WriteCommand) -> None:
    """Read pictures and sounds and save the memory; an interruption keeps nothing."""
    if command.memory or command.separate:
        raise ValueError(
            "a memory of pictures and sounds begins anew, with all of them: leave out --memory and --separate"
        )
    reading.check_out(command.out, command.memory)
    model, tokenizer = command.load()
    template, lines = command.template_for(tokenizer), Lines()
    try:
        memory = media.remember(model, template, command.files, progress=lambda n: lines(f"read {counted(n, 'token')}"))
    except KeyboardInterrupt:
        say("interrupted: what was read of pictures and sounds is not kept")
        raise
    save(memory, command.out)
    print(described(show(command.out), command.out))


@contextmanager
def sigterm_is_ctrl_c() -> Iterator[None]:
    """Treat SIGTERM in the block as Ctrl-C, so that what was read is kept. Batch systems and `timeout` send it."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def shown() -> Iterator[Callable[[reading.Progress], None]]:
    """Yield a function that shows the progress of reading: a bar on a terminal, else a line now and then."""
    console = Console(stderr=True)
    columns = (
        TextColumn("reading {task.fields[tokens]:,} tokens, {task.fields[speed]:,.0f} tokens/s"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    began, lines = time.monotonic(), Lines()
    first: int | None = None  # tokens at the first call: those of a continued memory do not count for the speed
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, tokens=0, speed=0.0)

        def progress(now: reading.Progress) -> None:
            nonlocal first
            first = now.tokens if first is None else first
            speed = (now.tokens - first) / max(time.monotonic() - began, 1e-9)
            total = None if now.share is None else 1.0
            bar.update(task, completed=now.share or 0.0, total=total, tokens=now.tokens, speed=speed)
            if not console.is_terminal:
                share = "" if now.share is None else f" ({now.share:.0%})"
                lines(f"read {counted(now.tokens, 'token')}{share}, {speed:,.0f} tokens/s")

        yield progress


# ask, show


def ask(command: AskCommand) -> None:
    """Print the prompt and the text generated from the memory, as it comes."""
    prompt = prompt_text(command.prompt)
    if not prompt:
        raise ValueError("ask needs a prompt: --prompt TEXT, or --prompt - to read standard input")
    model, tokenizer = command.load()
    memory = load_memory(command.memory, model)
    if any("kind" in source for source in memory.sources):  # of pictures or sounds: the prompt is a question
        template = command.template_for(tokenizer)
        ids, stop = media.asked(model, template, memory, prompt), command.stop
        how: dict[str, Any] = {"max_tokens": command.max_tokens, "stop": stop}
        type_out("", media.answer_to(model, template, ids, memory.state, command.sampling, **how))
        return
    how = {"max_tokens": command.max_tokens, "stop": command.stop, "engine": command.engine}
    how |= asdict(command.sampling)
    type_out(prompt, stream_generate(model, tokenizer, prompt, memory=command.memory, **how))


def layers_of(config: dict[str, Any]) -> int:
    """Return the number of blocks of the model in a memory file; files of version 0.1.0 store the number."""
    return config["layers"] if "layers" in config else sum(block["repeat"] for block in config["blocks"])


def described(about: dict[str, Any], path: Path) -> str:
    """Return the result of `show` as text."""
    config, sources = about["config"], about["sources"]
    read = f"{counted(about['tokens'], 'token')} of {counted(len(sources), 'document')}"
    size = f", {counted(layers_of(config), 'layer')}, width {config['dim']}" if config else ""
    lines = [
        f"{path}: {read}, position {about['position']:,}",
        f"  {decimal(about['state_bytes'])} of state ({' and '.join(about['kinds'])}), "
        f"{decimal(about['file_bytes'])} of file",
        f"  model {about['model']}{size}",
    ]
    if about["pending"]:
        lines.append(f"  still to be read: {about['pending']}")
    for source in sources[:SHOWN]:
        part = f", part {source['part']}" if "part" in source else ""
        tokens = counted(source["tokens"], "token")
        lines.append(f"    {source['name']}: {tokens}{part}, sha256 {source['sha256'][:12]}")
    if len(sources) > SHOWN:
        lines.append(f"    and {len(sources) - SHOWN} more")
    if about["errors"]:
        lines.append("  read apart, not in a row; what that changed in each layer's state (relative, parts in order):")
        lines.append("    " + "  ".join(f"{error:.2g}" for error in about["errors"]))
    return "\n".join(lines)
