"""`retentive bench train`, `prefill`, `decode`, `memory`: whole models, a RetNet beside its Transformer twin."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retentive.bench import decode, memory, prefill, training
from retentive.bench.lab import models
from retentive.cli.results import bench_device, keep, keep_with_picture, progress, words
from retentive.models import RetNetConfig, build, preset, twin


@dataclass(frozen=True, kw_only=True)
class Sized:
    """A RetNet of a named size; the models beside it have its parameters."""

    size: str = "5m"
    """Size of the RetNet; the others have its parameters."""
    vocab_size: int = 4096
    """Tokens of the vocabulary."""
    json: Path | None = None
    """File for the result; a picture is put beside it."""

    @property
    def config(self) -> RetNetConfig:
        return preset(self.size, vocab_size=self.vocab_size)

    def kept(self, result: dict[str, Any], typed: str) -> dict[str, Any]:
        """What goes into the file."""
        return {"command": typed, "size": self.size, "vocab_size": self.vocab_size, **result}


@dataclass(frozen=True, kw_only=True)
class TrainBench(Sized):
    """Training step: tokens/s and memory of a RetNet and of its Transformer twin, by length."""

    lengths: tuple[int, ...] = (2048, 8192)
    """Sequence lengths."""
    tokens: int = 8192
    """Tokens a step, one row at least."""
    precision: str = "bf16"
    """bf16 (autocast) or fp32."""
    checkpoint_activations: bool = False
    """Recompute each block in the backward pass, for models and lengths that memory has no room for otherwise."""
    repeats: int = 5
    """Steps timed of each, in turns; the best counts."""
    patience: float = 60
    """Seconds; of what takes longer one step must do."""
    device: str = "auto"
    """cpu, cuda, or auto."""


@dataclass(frozen=True, kw_only=True)
class PrefillBench(Sized):
    """Reading a prompt: tokens/s of a RetNet and of its Transformer twins, by length."""

    lengths: tuple[int, ...] = prefill.LENGTHS
    """Tokens of the prompt."""
    models: tuple[str, ...] = prefill.MODELS
    """retnet, transformer, grouped (the twin with grouped heads)."""
    precision: str = "bf16"
    """bf16 or fp32, of weights and caches; the state is float32 in any case."""
    repeats: int = 3
    """Prompts timed of each, in turns; the best counts."""
    patience: float = 60
    """Seconds; of what takes longer one prompt must do."""
    device: str = "auto"
    """cpu, cuda, or auto."""


@dataclass(frozen=True, kw_only=True)
class DecodeBench(Sized):
    """Decoding: memory, throughput and latency by context and batch, RetNet and its twins (the paper's Figure 6)."""

    contexts: tuple[int, ...] = decode.CONTEXTS
    """Tokens that have been read."""
    batches: tuple[int, ...] = decode.BATCHES
    """Sequences decoded together."""
    models: tuple[str, ...] = tuple(models.NAMES)
    """retnet, transformer, grouped (the twin with grouped heads), llama (of transformers, where that is installed)."""
    precision: str = "bf16"
    """bf16 or fp32, of weights and caches; the state is float32 in any case."""
    steps: int = 16
    """Tokens decoded in a repetition."""
    repeats: int = 3
    """Repetitions timed of each, in turns; the best counts."""
    device: str = "auto"
    """cpu, cuda, or auto."""


@dataclass(frozen=True, kw_only=True)
class MemoryBench(Sized):
    """Memory and time per token against context: a RetNet's state beside its twin's KV cache."""

    contexts: tuple[int, ...] = memory.CONTEXTS
    """Context lengths."""
    batch: int = 1
    """Sequences decoded together."""


def bench_train(command: TrainBench, typed: str) -> None:
    result = training.measure(
        command.config,
        lengths=command.lengths,
        tokens=command.tokens,
        precision=command.precision,
        checkpoint_activations=command.checkpoint_activations,
        repeats=command.repeats,
        patience=command.patience,
        device=bench_device(command.device),
        say=progress,
    )
    print(training.table(result))
    title = f"A training step ({command.size})"
    keep_with_picture(command.json, command.kept(result, typed), training.plot, title)


def bench_prefill(command: PrefillBench, typed: str) -> None:
    result = prefill.measure(
        command.config,
        lengths=command.lengths,
        models=words(command.models),
        precision=command.precision,
        repeats=command.repeats,
        patience=command.patience,
        device=bench_device(command.device),
        say=progress,
    )
    print(prefill.table(result))
    keep_with_picture(command.json, command.kept(result, typed), prefill.plot, f"Reading a prompt ({command.size})")


def bench_decode(command: DecodeBench, typed: str) -> None:
    result = decode.measure(
        command.config,
        contexts=command.contexts,
        batches=command.batches,
        models=words(command.models),
        precision=command.precision,
        steps=command.steps,
        repeats=command.repeats,
        device=bench_device(command.device),
        say=progress,
    )
    print(decode.table(result))
    keep_with_picture(command.json, command.kept(result, typed), decode.plot, f"Decoding ({command.size})")


def bench_memory(command: MemoryBench, typed: str) -> None:
    models = {"RetNet": build(command.config).eval(), "Transformer twin": build(twin(command.config)).eval()}
    rows = memory.measure(models, contexts=command.contexts, batch=command.batch)
    print(memory.table(rows))
    if command.json:
        keep(command.json, command.kept(memory.report(rows), typed) | {"batch": command.batch})
        title = f"What remembering costs: a RetNet ({command.size}) and a Transformer of its size"
        memory.plot(rows, command.json.with_suffix(".png"), title=title)
