"""The log of a run: a progress bar for people, metrics.jsonl for programs, TensorBoard and W&B where asked for."""

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
from retentive.train.config import TrainConfig

SECONDS = 15
"""Between two lines of progress where there is no terminal, and so no bar."""


class Log:
    """Writes one line of metrics.jsonl a step, and the same to the progress bar and the optional writers.

    Args:
        start: the finished steps that the run goes on from; what the file has of later ones is dropped.
        quiet: nothing on stderr.
    """

    def __init__(self, run: Path, config: TrainConfig, *, start: int, quiet: bool = False):
        self.path = run / "metrics.jsonl"
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
        self._evaluated = 0  # bytes of text that it covered
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
        with suppress(OSError):  # what `check` would raise must not hide why the run ends
            self._flush()
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    def step(self, metrics: dict[str, Any]) -> None:
        """Records a step's metrics; `step` among them counts finished steps."""
        self._write(metrics)
        text = (
            f"loss {metrics['loss']:.3f}  {metrics['tokens_per_second']:,.0f} tok/s  "
            f"MFU {metrics['mfu']:.0%}  {metrics['memory'] / 2**30:.1f} GB{self._held_out}"
        )
        self._bar.update(self._task, completed=metrics["step"], description=text)
        if not self._console.is_terminal and time.monotonic() - self._last_print > SECONDS:
            self._last_print = time.monotonic()
            rate = (time.monotonic() - self._began) / max(metrics["step"] - self._start, 1)
            left = rate * (self._steps - metrics["step"])
            self.say(f"step {metrics['step']}/{self._steps}  {text}  {left / 60:.0f} min left")

    def skipped(self, step: int, total: int, line: str) -> None:
        """Records that a step was left out, the `total`-th of the run, and says so."""
        self._write({"step": step, "skipped": total})
        self._bar.update(self._task, completed=step)
        self.say(line)

    def held_out(self, step: int, result: HeldOut, *, last: bool = False) -> None:
        """Records an evaluation: on the same part of the text every time, and at the end (`last`) on a longer one."""
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
            return  # there is no longer part: this very result has been printed
        self._evaluated = result.bytes
        size = decimal(result.bytes)
        which = " (the longer part, read once at the end)" if last else ""
        weights = " by the averaged weights" if self._averaged else ""
        each = ", ".join(f"{name} {part.bits_per_byte:.3f}" for name, part in (result.parts or {}).items())
        parts = f" as mixed ({each})" if each else ""
        self.say(f"step {step}: held-out {result.bits_per_byte:.3f} bits per byte of {size}{which}{parts}{weights}")

    def sample(self, step: int, text: str) -> None:
        """Records and shows a sample of what the model writes."""
        self._write({"step": step, "sample": text})
        shown = "\n    ".join(text.strip("\n").splitlines()[:6])
        self.say(f"step {step}, a sample:\n    {shown}")

    def say(self, text: str) -> None:
        """Prints a line for people; nothing for ""."""
        if text:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _write(self, record: dict[str, Any]) -> None:
        self._unwritten += json.dumps(record).encode() + b"\n"
        self._flush()  # at once: others read it while the run goes on
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        if self._tensorboard:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, record["step"])
        if self._wandb and numbers:
            self._wandb.log(numbers, step=record["step"])

    def _flush(self) -> None:
        """Writes what is not written yet; what does not fit on the disk now is tried again."""
        try:
            while self._unwritten:
                del self._unwritten[: self._file.write(self._unwritten)]
            self._error = None
        except OSError as error:
            self._error = error

    def check(self) -> None:
        """Raises OSError where records could not be written, and cannot be now: to be asked before a checkpoint."""
        self._flush()
        if self._error:
            with naming(self.path):
                raise self._error

    def _keep_until(self, step: int) -> None:
        """Drops what an interrupted run wrote after the checkpoint that this one goes on from."""
        if self.path.is_file():
            kept = [json.dumps(record) + "\n" for record in read_metrics(self.path.parent) if record["step"] <= step]
            write_text(self.path, "".join(kept))


def numbers_of(result: HeldOut, key: str) -> dict[str, float]:
    """An evaluation as a line of metrics has it, its bits per byte as `key`."""
    return {key: result.bits_per_byte, "held_out_loss": result.loss, "bytes": result.bytes}


class Silence:
    """The log of a process that is not the first one of its run: nothing."""

    def __enter__(self) -> "Silence":
        return self

    def __exit__(self, *exc) -> None:
        pass

    def step(self, metrics: dict[str, Any]) -> None:
        """Nothing, as all of these."""

    def held_out(self, step: int, result: HeldOut, *, last: bool = False) -> None:
        pass

    def skipped(self, step: int, total: int, line: str) -> None:
        pass

    def sample(self, step: int, text: str) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def check(self) -> None:
        pass


def say(text: str, *, quiet: bool = False) -> None:
    """Prints a line for people where there is no Log."""
    Console(stderr=True, quiet=quiet).print(text, highlight=False, markup=False, soft_wrap=True)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl; a last line that is still being written is left out.

    Raises:
        FileNotFoundError: no run there; ValueError: the file is damaged.
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


def check_extras(config: TrainConfig) -> None:
    """Looks, before anything is written, whether the optional writers can be used.

    Raises:
        ModuleNotFoundError: one that is asked for is not installed.
        ValueError: Weights & Biases needs a login.
    """
    writers = {"--tensorboard": (config.tensorboard, "torch.utils.tensorboard"), "--wandb": (config.wandb, "wandb")}
    for flag, (wanted, module) in writers.items():
        try:
            if wanted:
                importlib.import_module(module)
        except ImportError:
            raise ModuleNotFoundError(f"{flag} needs an extra: pip install 'retentive[log]'") from None
    if config.wandb and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        try:
            wandb.login(verify=False)  # in a terminal it asks for the key, elsewhere it raises
        except wandb.Error:
            how = "run `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline"
            raise ValueError(f"--wandb needs a login: {how}") from None


def _tensorboard(run: Path):
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run / "tensorboard"))


def _wandb(run: Path, config: TrainConfig):
    import wandb

    try:
        return wandb.init(project=config.wandb, name=run.name, dir=str(run), resume="allow")
    except wandb.Error as error:
        raise OSError(f"--wandb {config.wandb}: {error} (WANDB_MODE=offline does without the service)") from None
