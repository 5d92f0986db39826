"""`retentive bench NAME`: measurements of whole models on this machine, as JSON, a table and a picture."""

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from retentive.bench import memory, training
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


VERBS = {"train": TrainBench, "memory": MemoryBench}


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: retentive bench NAME [OPTIONS]\n")
        for name, cls in VERBS.items():
            print(f"  {name:<8} {cls.__doc__}")
        return
    if argv[0] not in VERBS:
        raise ValueError(f"unknown bench {argv[0]!r}, expected one of {', '.join(VERBS)}")
    command: TrainBench | MemoryBench = tyro.cli(VERBS[argv[0]], prog=f"retentive bench {argv[0]}", args=argv[1:])
    config = preset(command.size, vocab_size=command.vocab_size)
    if isinstance(command, TrainBench):
        if command.precision not in ("bf16", "fp32"):
            raise ValueError(f"--precision must be bf16 or fp32, got {command.precision!r}")
        result = training.measure(
            config,
            lengths=command.lengths,
            tokens=command.tokens,
            precision=command.precision,
            repeats=command.repeats,
        )
        print(training.table(result))
    else:
        models = {"RetNet": build(config).eval(), "Transformer twin": build(twin(config)).eval()}
        rows = memory.measure(models, contexts=command.contexts, batch=command.batch)
        result = memory.report(rows)
        print(memory.table(rows))
    if command.json:
        command.json.parent.mkdir(parents=True, exist_ok=True)
        command.json.write_text(json.dumps({**result, "size": command.size}, indent=2) + "\n", encoding="utf-8")
        if isinstance(command, MemoryBench):
            memory.plot(rows, command.json.with_suffix(".png"), title=f"Remembering with RetNet {command.size}")
