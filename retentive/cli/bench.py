"""`retentive bench NAME`: measurements of whole models on this machine, as JSON, a table and a picture."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from retentive.bench import memory, run, training
from retentive.checkpoint import write_json
from retentive.data.tokenizer import load_tokenizer
from retentive.models import build, preset, twin


@dataclass(frozen=True)
class TrainBench:
    """Training step: tokens/s of a RetNet and of its Transformer twin, taking turns."""

    size: str = "5m"
    """Size of the RetNet; the twin has its parameters."""
    vocab_size: int = 4096
    """Tokens of the vocabulary."""
    lengths: tuple[int, ...] = (2048, 8192)
    """Sequence lengths."""
    tokens: int = 8192
    """Tokens a step."""
    precision: str = "bf16"
    """bf16 (autocast) or fp32."""
    repeats: int = 5
    """Steps timed of each; the best counts."""
    json: Path | None = None
    """File for the result."""


@dataclass(frozen=True)
class MemoryBench:
    """Memory and time per token against context: a RetNet's state beside its twin's KV cache."""

    size: str = "5m"
    """Size of the RetNet; the twin has its parameters."""
    vocab_size: int = 4096
    """Tokens of the vocabulary."""
    contexts: tuple[int, ...] = memory.CONTEXTS
    """Context lengths."""
    batch: int = 1
    """Sequences decoded together."""
    json: Path | None = None
    """File for the result; a picture is put beside it."""


@dataclass(frozen=True)
class RunBench:
    """A training run: its curve, and held-out bits per byte beside order-0 entropy and xz -9."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    data: Path
    """The packed data that it was trained on."""
    json: Path | None = None
    """File for the result; a picture is put beside it."""


VERBS = {"train": TrainBench, "memory": MemoryBench, "run": RunBench}


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: retentive bench NAME [OPTIONS]\n")
        for name, cls in VERBS.items():
            print(f"  {name:<8} {cls.__doc__}")
        return
    if argv[0] not in VERBS:
        raise ValueError(f"unknown bench {argv[0]!r}, expected one of {', '.join(VERBS)}")
    kind = VERBS[argv[0]]
    command: TrainBench | MemoryBench | RunBench = tyro.cli(kind, prog=f"retentive bench {argv[0]}", args=argv[1:])
    if isinstance(command, TrainBench):
        bench_train(command)
    elif isinstance(command, MemoryBench):
        bench_memory(command)
    else:
        bench_run(command)


def bench_train(command: TrainBench) -> None:
    if command.precision not in ("bf16", "fp32"):
        raise ValueError(f"--precision must be bf16 or fp32, got {command.precision!r}")
    result = training.measure(
        preset(command.size, vocab_size=command.vocab_size),
        lengths=command.lengths,
        tokens=command.tokens,
        precision=command.precision,
        repeats=command.repeats,
    )
    print(training.table(result))
    if command.json:
        keep(command.json, {**result, "size": command.size})


def bench_memory(command: MemoryBench) -> None:
    config = preset(command.size, vocab_size=command.vocab_size)
    models = {"RetNet": build(config).eval(), "Transformer twin": build(twin(config)).eval()}
    rows = memory.measure(models, contexts=command.contexts, batch=command.batch)
    print(memory.table(rows))
    if command.json:
        keep(command.json, {**memory.report(rows), "size": command.size, "batch": command.batch})
        title = f"What remembering costs: a RetNet ({command.size}) and a Transformer of its size"
        memory.plot(rows, command.json.with_suffix(".png"), title=title)


def bench_run(command: RunBench) -> None:
    result = run.report(command.run, command.data, load_tokenizer(command.data))
    for name in ("order-0 entropy", "xz -9"):
        print(f"{name:<18}{result['yardsticks'][name]:6.3f} bits per byte")
    print(f"{'this model':<18}{result['final'][1]:6.3f} bits per byte")
    if command.json:
        keep(command.json, result)
        run.plot(
            result, command.json.with_suffix(".png"), title=f"{command.run.name}: {result['tokens'] / 1e6:.1f} M tokens"
        )


def keep(path: Path, result: dict) -> None:
    """Write a result file, its folder made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
