"""`retentive bench NAME`: measurements of whole models on this machine, as JSON, a table and a picture."""

import functools
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

import retentive
from retentive.bench import http, memory_file, retention, retention_report, scoring, serving, soak, speculation, step
from retentive.checkpoint import load_with_tokenizer, save_model
from retentive.cli import bench_models as models
from retentive.cli.bench_scoring import ScoringBench, score_both_ways
from retentive.cli.results import bench_device, keep, keep_with_picture, progress, words
from retentive.data.tokenizer import load_tokenizer, train_bpe
from retentive.models import build, preset
from retentive.studies import prompting, recall, training_run


@dataclass(frozen=True)
class RunBench:
    """A training run: its curve, and held-out bits per byte beside order-0 entropy and xz -9."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    data: Path
    """The packed data that it was trained on."""
    json: Path | None = None
    """File for the result; a picture is put beside it."""


@dataclass(frozen=True)
class RetentionBench:
    """The operator: time and memory of forward and backward beside its rivals and the machine's limit."""

    shapes: tuple[str, ...] = ("small", "1.3B")
    """Of 5m, small, 1.3B, 6.7B, long: heads as in our small model, a quarter of the paper's, the paper's."""
    lengths: tuple[int, ...] = ()
    """Sequence lengths, in place of each shape's own."""
    dtypes: tuple[str, ...] = ("fp32",)
    """Of q, k and v: fp32, bf16, fp16."""
    rivals: tuple[str, ...] = ("auto",)
    """Of torchscale, sdpa, fla; auto takes those that are installed, none takes none."""
    repeats: int = 5
    """Passes timed of each; the best counts. What takes longer than 20 s runs once."""
    patience: float = 600
    """Seconds of one pass beyond which a contestant is left out, with a word."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu or cuda."""
    json: Path | None = None
    """File for the result; a picture is put beside it."""


@dataclass(frozen=True)
class StepBench:
    """The decoding step of one layer beside plain torch and the time that reading its state takes."""

    shapes: tuple[str, ...] = ("small", "1.3B")
    """Of small, 1.3B, 6.7B."""
    batches: tuple[int, ...] = step.BATCHES
    """Sequences decoded together."""
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    """Of q, k and v: fp32, bf16, fp16. The state is float32."""
    repeats: int = 5
    """Repetitions timed of each; the best counts."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu or cuda."""
    json: Path | None = None
    """File for the result; a picture is put beside it."""


@dataclass(frozen=True)
class PromptingBench:
    """Structured prompting: few-shot accuracy from merged groups, from the same in a row, and from nothing."""

    data: tyro.conf.Positional[Path]
    """Folder of texts: novels, tinyshakespeare, qmsum, summarization, gov_report, eval and translation."""
    out: Path = Path("runs/prompting")
    """Folder of the model, which is trained first if it is not there."""
    size: str = "1m"
    """Size of the model."""
    steps: int = 1500
    """Training steps of 8 tasks."""
    episodes: int = 20
    """Tasks of each set of texts that are measured."""
    json: Path | None = None
    """File for the result; a picture is put beside it."""


@dataclass(frozen=True)
class AskBench:
    """A question to a memory that has read little and to one that has read much: time and bytes."""

    size: str = "5m"
    """Size of the RetNet, freshly initialised."""
    vocab_size: int = 4096
    """Tokens of the vocabulary."""
    lengths: tuple[int, ...] = memory_file.LENGTHS
    """Tokens that each memory has read."""
    repeats: int = 15
    """Questions timed of each, in turns; the median counts."""
    json: Path | None = None
    """File for the result."""


@dataclass(frozen=True)
class ServingBench:
    """The engine beside the bare batched step, many streams beside one, a prefix hit beside a miss, a long stream."""

    size: str = "5m"
    """Size of the RetNet, freshly initialised."""
    vocab_size: int = 4096
    """Tokens of the vocabulary."""
    streams: int = 16
    """Streams at once."""
    tokens: int = 256
    """Tokens of each stream, a repetition."""
    prompt: int = 4000
    """Tokens of the prompt whose first answer is timed."""
    long: int = 100_000
    """Tokens of the long stream; 0 leaves it out."""
    repeats: int = 5
    """Repetitions timed of each, in turns; the median counts."""
    server: bool = False
    """The same streams through the HTTP server as well."""
    json: Path | None = None
    """File for the result."""


@dataclass(frozen=True)
class SpeculationBench:
    """Speculative decoding beside plain: tokens a call of the model and tokens/s, by look-up and by a draft model."""

    run: tyro.conf.Positional[str]
    """Run directory or model folder."""
    texts: tyro.conf.Positional[tuple[Path, ...]]
    """Text files; the model goes on from the beginning of each."""
    draft: str | None = None
    """Run directory of a smaller model of the same vocabulary."""
    prompt: int = 300
    """Tokens of each text that are read."""
    tokens: int = 200
    """Tokens that are written after each."""
    most: tuple[int, ...] = (2, 4, 8)
    """Guesses a call."""
    repeats: int = 3
    """Repetitions timed of each, in turns; the median counts."""
    json: Path | None = None
    """File for the result."""


@dataclass(frozen=True)
class SoakBench:
    """The server under random clients: no reply lost or mixed up, nothing left over, memory flat, SIGTERM drains."""

    minutes: float = 10
    """How long."""
    json: Path | None = None
    """File for the result; a picture is put beside it."""


@dataclass(frozen=True)
class RecallBench:
    """Associative recall: small models trained to answer from pairs of keys and values that stand before."""

    out: Path = Path("runs/recall")
    """Folder for the models; those that are there are not trained again."""
    variants: tuple[str, ...] = recall.VARIANTS
    """As `retentive compare --variants`."""
    dims: tuple[int, ...] = (64,)
    """Widths of the models, of two layers."""
    pairs: tuple[int, ...] = recall.PAIRS
    """Pairs in a row."""
    steps: int = 4000
    """Training steps."""
    lr: float = 4e-3
    """Peak learning rate."""
    json: Path | None = None
    """File for the result; a picture is put beside it."""


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: retentive bench NAME [OPTIONS]\n")
        for name, (cls, _) in VERBS.items():
            print(f"  {name:<11} {cls.__doc__}")
        return
    if argv[0] not in VERBS:
        raise ValueError(f"unknown bench {argv[0]!r}, expected one of {', '.join(VERBS)}")
    kind, measure = VERBS[argv[0]]
    command: Any = tyro.cli(kind, prog=f"retentive bench {argv[0]}", args=argv[1:])
    typed = shlex.join(["retentive", "bench", *argv])
    measure(command, typed)


def bench_run(command: RunBench, typed: str) -> None:
    result = training_run.report(command.run, command.data, load_tokenizer(command.data))
    for name in ("order-0 entropy", "xz -9"):
        print(f"{name:<18}{result['yardsticks'][name]:6.3f} bits per byte")
    print(f"{'this model':<18}{result['final'][1]:6.3f} bits per byte")
    if command.json:
        keep(command.json, {"command": typed, **result})
        training_run.plot(
            result, command.json.with_suffix(".png"), title=f"{command.run.name}: {result['tokens'] / 1e6:.1f} M tokens"
        )


def bench_retention(command: RetentionBench, typed: str) -> None:
    result = retention.measure(
        words(command.shapes),
        lengths=command.lengths,
        dtypes=words(command.dtypes),
        rivals=words(command.rivals),
        repeats=command.repeats,
        patience=command.patience,
        device=bench_device(command.device),
        say=progress,
    )
    print(retention_report.table(result))
    keep_with_picture(command.json, {"command": typed, **result}, retention_report.plot, "Retention")


def bench_step(command: StepBench, typed: str) -> None:
    result = step.measure(
        words(command.shapes),
        batches=command.batches,
        dtypes=words(command.dtypes),
        repeats=command.repeats,
        device=bench_device(command.device),
        say=progress,
    )
    print(step.table(result))
    keep_with_picture(command.json, {"command": typed, **result}, step.plot, "A decoding step")


def bench_prompting(command: PromptingBench, typed: str) -> None:
    kinds = prompting.split(prompting.kinds(command.data), new=False)
    activities = prompting.split(prompting.activities(command.data), new=True)
    if not command.out.exists():
        learn(command, [kinds[0], activities[0]])
    model, tokenizer = retentive.load(command.out)
    sets = {"kinds of text": kinds[1], "activities": activities[1], "activities never seen": activities[2]}
    result = prompting.measure(model, tokenizer, sets, episodes=command.episodes, say=progress)
    print(prompting.table(result))
    keep_with_picture(command.json, {"command": typed, **result}, prompting.plot, "Structured prompting")


def learn(command: PromptingBench, families: list[dict[str, list[str]]]) -> None:
    """Train the model and write it to --out."""
    tokenizer = train_bpe((d.text for d in prompting.tasks(families, 3000, seed=1)), 4096)
    config = preset(command.size, vocab_size=tokenizer.vocab_size, heads=4, decay=prompting.decays(4))
    model = prompting.learn(config, tokenizer, families, steps=command.steps, say=progress)
    save_model(command.out, model, tokenizer)


def bench_recall(command: RecallBench, typed: str) -> None:
    how = dict(dims=command.dims, pairs=command.pairs, steps=command.steps, lr=command.lr, say=progress)
    result = recall.measure(command.out, variants=words(command.variants), **how)  # type: ignore[arg-type]
    print(recall.table(result))
    keep_with_picture(command.json, {"command": typed, **result}, recall.plot, "Associative recall")


def bench_ask(command: AskBench, typed: str) -> None:
    torch.manual_seed(0)
    model = build(preset(command.size, vocab_size=command.vocab_size)).eval()
    result = memory_file.measure(model, lengths=command.lengths, repeats=command.repeats, say=progress)
    print(memory_file.table(result))
    if command.json:
        keep(command.json, {"command": typed, **result, "size": command.size})


def bench_serving(command: ServingBench, typed: str) -> None:
    model = build(preset(command.size, vocab_size=command.vocab_size)).eval()
    result = serving.measure(
        model,
        streams=command.streams,
        tokens=command.tokens,
        prompt=command.prompt,
        long=command.long,
        repeats=command.repeats,
        server=functools.partial(http.measure, repeats=command.repeats, say=progress) if command.server else None,
        say=progress,
    )
    print(serving.table(result))
    if command.server:
        print(f"the server gives {result['server']['server_over_engine']:.1%} of the engine's tokens/s")
    if command.json:
        keep(command.json, {"command": typed, "size": command.size, **result})


def bench_speculation(command: SpeculationBench, typed: str) -> None:
    model, tokenizer = load_with_tokenizer(command.run)
    texts = [tokenizer.encode(path.read_text(encoding="utf-8"))[: command.prompt] for path in command.texts]
    draft = retentive.load(command.draft)[0].eval() if command.draft else None
    result = speculation.measure(
        model.eval(),
        texts,
        draft=draft,
        most=command.most,
        tokens=command.tokens,
        repeats=command.repeats,
        say=progress,
    )
    print(speculation.table(result))
    if command.json:
        keep(command.json, {"command": typed, **result})


def bench_soak(command: SoakBench, typed: str) -> None:
    if not command.minutes > 0:
        raise ValueError(f"--minutes must be above 0, got {command.minutes}")
    result = soak.measure(command.minutes, say=progress)
    print(soak.table(result))
    keep_with_picture(command.json, {"command": typed, **result}, soak.plot, "The server under random clients")
    if not result["ok"]:
        raise ValueError("the soak found what must not be: see above")


def bench_scoring(command: ScoringBench, typed: str) -> None:
    result = score_both_ways(command, say=progress)
    print(scoring.table(result))
    if command.json:
        keep(command.json, {"command": typed, **result})


VERBS: dict[str, tuple[type, Callable[[Any, str], None]]] = {
    "train": (models.TrainBench, models.bench_train),
    "prefill": (models.PrefillBench, models.bench_prefill),
    "decode": (models.DecodeBench, models.bench_decode),
    "memory": (models.MemoryBench, models.bench_memory),
    "run": (RunBench, bench_run),
    "retention": (RetentionBench, bench_retention),
    "step": (StepBench, bench_step),
    "prompting": (PromptingBench, bench_prompting),
    "recall": (RecallBench, bench_recall),
    "ask": (AskBench, bench_ask),
    "serving": (ServingBench, bench_serving),
    "speculation": (SpeculationBench, bench_speculation),
    "scoring": (ScoringBench, bench_scoring),
    "soak": (SoakBench, bench_soak),
}
