"""The log of a run: a progress bar for people, metrics.jsonl for programs, TensorBoard and W&B on request.

A step skipped because its loss or gradient was not finite has a record with "skipped", the number of skipped steps so
far. A resumed run counts on from it.
"""

import importlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from retentive.evals.heldout import HeldOut
from retentive.files import naming, write_text
from retentive.options import option
from retentive.tables import counted, duration
from retentive.train.config import TrainConfig
from retentive.train.directory import read_options
from retentive.train.speed import Speedometer
from retentive.train.step import Training

SECONDS = 15
"""Seconds between two lines of progress without a terminal, where there is no bar."""


class Silence:
    """The log of every rank but rank 0: it only counts skipped steps."""

    def __init__(self, run: Path, config: TrainConfig, *, start: int):
        self._most, self._skipped, self._in_a_row = config.skip_nonfinite, 0, 0
        for record in read_metrics(run) if start and self._most else ():
            if record["step"] <= start and "loss" in record:
                self._in_a_row = 0
            elif record["step"] <= start and "skipped" in record:
                self._skipped, self._in_a_row = record["skipped"], self._in_a_row + 1

    def __enter__(self) -> "Silence":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def begin_step(self) -> None:
        """Start timing a step."""

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """Record the metrics of a step; `step` counts it as finished."""
        self._in_a_row = 0

    def skip(self, step: int, error: FloatingPointError) -> None:
        """Record a skipped step.

        Raises:
            FloatingPointError: more steps in a row were skipped than the config allows.
        """
        if self._in_a_row == self._most:
            before = f", after {counted(self._most, 'step')} in a row left out for that" if self._most else ""
            raise FloatingPointError(f"{error}{before}")
        self._skipped, self._in_a_row = self._skipped + 1, self._in_a_row + 1

    def held_out(self, step: int, result: HeldOut, *, last: bool = False) -> None:
        """Record an evaluation: on the same part of the text every time, and at the end (`last`) on a longer part."""

    def sample(self, step: int, text: str) -> None:
        """Record and print a sample of the model's text."""

    def say(self, text: str) -> None:
        """Print a line for people; nothing for ""."""

    def check(self) -> None:
        """Raise OSError if records are still unwritten and writing fails again; call it before each checkpoint."""


class Log(Silence):
    """Writes one line of metrics.jsonl a step, and the same to the progress bar and the optional writers.

    Args:
        start: finished steps that the run resumes from; later records in the file are dropped.
        speedometer: adds the speed of each step to its metrics.
        quiet: print nothing on stderr.
    """

    def __init__(self, run: Path, config: TrainConfig, *, start: int, speedometer: Speedometer, quiet: bool = False):
        super().__init__(run, config, start=start)
        self.path, self._speedometer = run / "metrics.jsonl", speedometer
        self._keep_until(start)
        self._file, self._unwritten = self.path.open("ab", buffering=0), bytearray()
        self._error: OSError | None = None
        self._console = Console(stderr=True, quiet=quiet)
        self._bar = Progress(
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._bar.add_task("", total=config.steps, completed=start)
        self._steps, self._start, self._began = config.steps, start, time.monotonic()
        self._last_print = time.monotonic()
        self._held_out = ""  # of the last evaluation, as the progress bar shows it
        self._evaluated = 0  # bytes of text that the last evaluation covered
        self._averaged = bool(config.ema)
        self._tensorboard = _tensorboard(run) if config.tensorboard else None
        self._wandb = _wandb(run, config) if config.wandb else None

    def __enter__(self) -> "Log":
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *exc) -> None:
        if self._console.is_terminal:
            self._bar.stop()
        with suppress(OSError):  # an error of writing must not hide why the run ends
            self._flush()
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    def begin_step(self) -> None:
        self._speedometer.start()

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        super().step(step, metrics)
        speed = self._speedometer.read(metrics.pop("tokens"))
        self._write({"step": step, **metrics, **speed})
        mfu = f"MFU {speed['mfu']:.0%}  " if "mfu" in speed else ""
        text = (
            f"loss {metrics['loss']:.3f}  {speed['tokens_per_second']:,.0f} tok/s  "
            f"{mfu}{speed['memory'] / 2**30:.1f} GB{self._held_out}"
        )
        self._bar.update(self._task, completed=step, description=text)
        if not self._console.is_terminal and time.monotonic() - self._last_print > SECONDS:
            self._last_print = time.monotonic()
            seconds = (time.monotonic() - self._began) / max(step - self._start, 1) * (self._steps - step)
            self.say(f"step {step}/{self._steps}  {text}  {duration(seconds)} left")

    def skip(self, step: int, error: FloatingPointError) -> None:
        super().skip(step, error)
        self._write({"step": step, "skipped": self._skipped})
        self._bar.update(self._task, completed=step)
        self.say(f"{error}: the step is left out, the weights are as before ({self._skipped} so far)")

    def held_out(self, step: int, result: HeldOut, *, last: bool = False) -> None:
        key = "final_bits_per_byte" if last else "bits_per_byte"
        record: dict[str, Any] = {"step": step, **numbers_of(result, key)}
        if self._averaged:
            record["weights"] = "averages"
        if result.parts:
            record["parts"] = {name: numbers_of(part, key) for name, part in result.parts.items()}
        self._write(record)
        if not last:
            self._held_out = f"  held-out {result.bits_per_byte:.3f} bits/byte"
        if last and result.bytes == self._evaluated:
            return  # the text has no longer part: this result is printed already
        self._evaluated = result.bytes
        size = decimal(result.bytes)
        which = " (the longer part, read once at the end)" if last else ""
        weights = " by the averaged weights" if self._averaged else ""
        each = ", ".join(f"{name} {part.bits_per_byte:.3f}" for name, part in (result.parts or {}).items())
        parts = f" as mixed ({each})" if each else ""
        self.say(f"step {step}: held-out {result.bits_per_byte:.3f} bits per byte of {size}{which}{parts}{weights}")

    def sample(self, step: int, text: str) -> None:
        self._write({"step": step, "sample": text})
        shown = "\n    ".join(text.strip("\n").splitlines()[:6])
        self.say(f"step {step}, a sample:\n    {shown}")

    def say(self, text: str) -> None:
        if text:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _write(self, record: dict[str, Any]) -> None:
        self._unwritten += json.dumps(record).encode() + b"\n"
        self._flush()  # at once: other programs read it during the run
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        if self._tensorboard:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, record["step"])
        if self._wandb and numbers:
            self._wandb.log(numbers, step=record["step"])

    def _flush(self) -> None:
        """Write pending records; records that do not fit on the disk are tried again later."""
        try:
            while self._unwritten:
                del self._unwritten[: self._file.write(self._unwritten)]
            self._error = None
        except OSError as error:
            self._error = error

    def check(self) -> None:
        self._flush()
        if self._error:
            with naming(self.path):
                raise self._error

    def _keep_until(self, step: int) -> None:
        """Drop the records of an interrupted run after the checkpoint that this run resumes from."""
        if self.path.is_file():
            kept = [json.dumps(record) + "\n" for record in read_metrics(self.path.parent) if record["step"] <= step]
            write_text(self.path, "".join(kept))


def open_log(training: Training, run: Path, *, quiet: bool = False) -> Silence:
    """Open this rank's log after the finished steps: rank 0 writes, the others are silent; all must call this."""
    config, start = training.config, training.step
    with training.cluster.barrier():
        if not training.cluster.main:
            return Silence(run, config, start=start)
        return Log(run, config, start=start, speedometer=Speedometer(training), quiet=quiet)


def numbers_of(result: HeldOut, key: str) -> dict[str, float]:
    """Numbers of an evaluation for metrics.jsonl, with the bits per byte as `key`."""
    return {key: result.bits_per_byte, "held_out_loss": result.loss, "bytes": result.bytes}


def say(text: str, *, quiet: bool = False) -> None:
    """Print a line for people without a Log."""
    Console(stderr=True, quiet=quiet).print(text, highlight=False, markup=False, soft_wrap=True)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read the records of a run's metrics.jsonl, without a last line that is still being written.

    Raises:
        FileNotFoundError: `run` has no metrics.jsonl.
        ValueError: the file is damaged.
    """
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"{run} is no run of `retentive train`: it has no metrics.jsonl")
    records = []
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), 1):
        if line.endswith(b"\n"):
            try:
                records.append(json.loads(line))
                _ = records[-1]["step"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{file}:{number} is no record of training: the file is damaged") from None
    return records


def history(run: str | Path) -> list[dict[str, Any]]:
    """Returns the curve of a run: a row for each step and each evaluation, for `pandas.DataFrame(history(run))`.

    Each row has `step` and `tokens` (trained on so far; absent if the loop was called without a TrainRun). A step has
    `loss` (nats per token), `lr`, `grad_norm`, `tokens_per_second`, `memory` (bytes) and `mfu`. An evaluation has
    `bits_per_byte` (the last one of all, on a longer part of the text, `final_bits_per_byte`), `held_out_loss` (nats
    per token) and `bytes`.

    Args:
        run: run directory. The run may still be training, or have been killed.

    Raises:
        FileNotFoundError: `run` has no metrics.jsonl.
        ValueError: a file is damaged.
    """
    records, options = read_metrics(Path(run)), read_options(Path(run))
    size = 0  # tokens of a step, the same in every mode of reading
    if command := options.get("command"):
        size = command["batch"] * command["length"] * options["train"]["accumulate"]
    return [
        {"step": record["step"], **({"tokens": record["step"] * size} if size else {}), **record}
        for record in records
        if "sample" not in record
    ]


def check_extras(config: TrainConfig) -> None:
    """Check that the optional writers can be used, before anything is written.

    Raises:
        ModuleNotFoundError: a requested writer is not installed.
        ValueError: Weights & Biases needs a login.
    """
    writers = {"tensorboard": (config.tensorboard, "torch.utils.tensorboard"), "wandb": (config.wandb, "wandb")}
    for name, (wanted, module) in writers.items():
        try:
            if wanted:
                importlib.import_module(module)
        except ImportError:
            raise ModuleNotFoundError(f"`{name}` needs an extra: pip install 'retentive[log]'") from None
    if config.wandb and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        try:
            wandb.login(verify=False)  # in a terminal it asks for the key, elsewhere it raises
        except wandb.Error:
            how = "run `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline"
            raise ValueError(f"`wandb` needs a login: {how}") from None


def _tensorboard(run: Path):
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run / "tensorboard"))


def _wandb(run: Path, config: TrainConfig):
    import wandb

    try:
        return wandb.init(project=config.wandb, name=run.name, dir=str(run), resume="allow")
    except wandb.Error as error:
        raise OSError(
            f"{option('wandb', config.wandb)}: {error} (WANDB_MODE=offline does without the service)"
        ) from None
