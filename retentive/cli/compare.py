"""`retentive compare`: several models on the same tokens, in the same order, with the same budget.

The plan is a list of training runs, each a run directory of `retentive train` below --out. Whoever runs the command
takes the next run that is not done and that nobody else is at; so several may, and whoever comes after an interruption
goes on where it was.
"""

import gc
import hashlib
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from filelock import FileLock, Timeout

import retentive
from retentive import machine
from retentive.bench.lab.tables import duration
from retentive.cli.train import read_recipe
from retentive.data.pack import load_meta
from retentive.data.packed import Packed
from retentive.evals import heldout
from retentive.files import write_json, write_together
from retentive.machine import pick_device
from retentive.models import cost, preset
from retentive.models.peers import KINDS
from retentive.studies import compare
from retentive.studies.compare import RECORD, VARIANTS, Run
from retentive.train import Interrupted, TrainConfig, TrainRun
from retentive.train.log import read_metrics
from retentive.train.run import FREE


@dataclass(frozen=True)
class CompareCommand:
    """Train variants of a model on the same tokens in the same order, and say how they compare."""

    data: Path
    """Folder of packed tokens with held-out text."""
    out: Path
    """Folder for the runs, made if need be; what is done there already is not done again."""
    variants: tuple[str, ...] = ("retnet", "transformer")
    """What is compared; the first is the baseline. A wrong name lists all."""
    sizes: tuple[str, ...] = ("1m",)
    """Sizes as `retentive train --size` takes them."""
    seeds: tuple[int, ...] = (0, 1)
    """Of initialisation and order of the text."""
    lrs: tuple[float, ...] = ()
    """Peak learning rates, of which each variant's best counts; that of --lr if not given."""
    mode: Literal["reset", "packed"] = "reset"
    """As `retentive train --mode`."""
    batch: int = 8
    """Rows of a batch."""
    length: int = 1024
    """Tokens of a row, in training and in evaluation."""
    jobs: int = 1
    """Processes at work side by side, each with its share of the cores."""
    mixed: bool = False
    """Allow runs of unlike machines in one table."""
    json: Path | None = None
    """File for the result; a picture is put beside it."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: TrainConfig(steps=500, lr=2e-3, sample_every=0, keep=1)
    )


HELP = """Train variants of a model on the same tokens in the same order, and say how they compare.

--recipe FILE.py takes the options that the file's function recipe() returns; further flags change them. Interrupt it
at any time: the same command goes on."""


def main(argv: list[str]) -> None:
    default, rest = read_recipe(argv, CompareCommand)
    command = tyro.cli(
        CompareCommand,
        prog="retentive compare",
        args=rest,
        description=HELP,
        default=tyro.MISSING_NONPROP if default is None else default,
    )
    run(command, argv)


def run(command: CompareCommand, argv: Sequence[str]) -> None:
    """Train what is missing, then print and keep the comparison of all that is done."""
    runs = plan(command)
    try:
        if command.jobs > 1:
            side_by_side(command.jobs, argv)
        else:
            work(command, runs)
    except Interrupted as stop:
        print(f"{stop} (the same command goes on)", file=sys.stderr)
    found = compare.records(command.out, runs)
    if len(found) < len(runs):
        print(f"{len(found)} of {len(runs)} runs are done", file=sys.stderr)
    compare.check_hardware(found, mixed=command.mixed)
    result = {"planned": len(runs), **compare.report(found, command.variants[0])}
    if not result["rows"]:
        return
    print(compare.table(result))
    if command.json:
        described = {"what": "comparison", "hardware": found[0]["hardware"], "about": about(command, runs[0])}
        described["machines"] = [r["hardware"] for r in compare.machines(found).values()]
        command.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(command.json, {"command": shlex.join(["retentive", "compare", *argv]), **described, **result})
        title = f"{result['rows'][0]['tokens'] / 1e6:.1f} M tokens a run, {found[0]['hardware']['cpu']}"
        write_together({command.json.with_suffix(".png"): lambda path: compare.plot(result, path, title=title)})


def plan(command: CompareCommand) -> list[Run]:
    """The runs, checked before any begins."""
    if command.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {command.jobs}")
    if command.train.seed != TrainConfig.seed:
        raise ValueError(f"--seed is not for comparisons, got {command.train.seed}: name them with --seeds")
    runs = compare.plan(command.variants, command.sizes, command.seeds, command.lrs or (command.train.lr,))
    others = [v for v in command.variants if VARIANTS[v].model in KINDS]
    if others and not find_spec("transformers"):
        raise ModuleNotFoundError(f"{others[0]} is a model of the transformers library: pip install 'retentive[peers]'")
    meta = load_meta(command.data)
    if meta.splits["valid"].tokens <= command.length:
        raise ValueError(f"{command.data} has too little held-out text for windows of {command.length} tokens")
    for run in runs:
        train_command(command, run).config(meta.vocab_size)
    return runs


def train_command(command: CompareCommand, run: Run) -> TrainRun:
    """What `retentive train` is told for a run."""
    config = preset(run.size, vocab_size=2)
    changes = compare.changes(run.variant, config)
    return TrainRun(
        data=command.data,
        out=command.out / run.name,
        size=run.size,
        model=VARIANTS[run.variant].model,  # type: ignore[arg-type]
        set=changes,
        mode=command.mode,
        batch=command.batch,
        length=command.length,
        resume=True,
        train=replace(command.train, lr=run.lr, seed=run.seed, sample_every=0),
    )


def side_by_side(jobs: int, argv: Sequence[str]) -> None:
    """As many processes of this command, each with its share of the cores; ends when all have.

    Raises:
        Interrupted: a signal came; they have saved what they were at.
        ChildProcessError: one of them failed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    command = [sys.executable, "-m", "retentive", "compare", *argv, "--jobs", "1", "--json", "None"]
    children = [subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) for _ in range(jobs)]
    stopped = False

    def stop(number, frame):  # they save, and end
        nonlocal stopped
        stopped = True
        for child in children:
            child.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    codes = [child.wait() for child in children]
    for number, handler in before.items():
        signal.signal(number, handler)
    if stopped:
        raise Interrupted("stopped")
    failed = [code for code in codes if code]
    if failed:
        raise ChildProcessError(f"a job ended with exit code {failed[0]}, it says why above")


def work(command: CompareCommand, runs: list[Run]) -> None:
    """Train and score each run that is not done and that no other process is at.

    A run whose loss is not a number is done as well: its record says so.

    Raises:
        Interrupted: a signal came; the run it was at is saved.
    """
    data = Packed(command.data)
    pairs = heldout.Pairs(data)
    command.out.mkdir(parents=True, exist_ok=True)
    for one in runs:
        folder = command.out / one.name
        try:
            with FileLock(command.out / f".{one.name}.lock", timeout=0):
                if (folder / RECORD).is_file():
                    check_done(folder / RECORD, about(command, one))
                    continue
                began = time.monotonic()
                record = one._asdict() | {"name": one.name, "about": about(command, one)}
                record["hardware"] = machine.describe()
                try:
                    record["memory"] = train(train_command(command, one))
                    record |= score(command, one, data, pairs)
                    told = f"{record['bits_per_byte']:.4f} bits per byte"
                except FloatingPointError as error:
                    record["failed"] = told = str(error)
                    folder.mkdir(exist_ok=True)
                write_json(folder / RECORD, record)
        except Timeout:
            continue  # another process is at it
        done, took = len(compare.records(command.out, runs)), duration(time.monotonic() - began)
        print(f"{one.name}: {told}, {took} ({done} of {len(runs)})", file=sys.stderr, flush=True)


def train(command: TrainRun) -> int:
    """The bytes that training took beyond what this process held before, at most."""
    device = pick_device(command.train.device)
    gc.collect()
    machine.free_memory(device)  # gives back what earlier runs have left
    before = machine.reset_peak_memory(device)
    command.run(quiet=True)
    return machine.peak_memory(device) - before


def score(command: CompareCommand, one: Run, data: Packed, pairs: heldout.Pairs) -> dict[str, Any]:
    """What came out of a run that is trained."""
    folder = command.out / one.name
    model, _ = retentive.load(folder)
    metrics = read_metrics(folder)
    steps = [r for r in metrics if "loss" in r]
    size = command.batch * command.length * command.train.accumulate
    every = max(1, len(steps) // 100)
    return {
        "parameters": cost.parameters(model.config),
        "block_parameters": cost.block_parameters(model.config),
        "tokens": len(steps) * size,
        **heldout.report(model, data, pairs, length=command.length),
        "curve": [[r["step"] * size, r["bits_per_byte"]] for r in metrics if "bits_per_byte" in r],
        "train_loss": [
            [part[-1]["step"] * size, statistics.mean(r["loss"] for r in part)]
            for part in (steps[n : n + every] for n in range(0, len(steps), every))
        ],
        "tokens_per_second": statistics.median(r["tokens_per_second"] for r in steps),
    }


def about(command: CompareCommand, one: Run) -> dict[str, Any]:
    """All that decides what comes out of a run but its name."""
    train = {name: value for name, value in asdict(train_command(command, one).train).items() if name not in FREE}
    data = hashlib.sha256((command.data / "meta.json").read_bytes()).hexdigest()
    return {"data_sha256": data, "mode": command.mode, "batch": command.batch, "length": command.length, "train": train}


def check_done(file: Path, wanted: dict[str, Any]) -> None:
    """Raises ValueError where the run that left this record is not the one that is wanted."""
    was = compare.read_record(file)["about"]
    flat = [x | x["train"] for x in (was, wanted)]
    for name in flat[1]:
        if name != "train" and flat[0].get(name) != flat[1][name]:
            raise ValueError(
                f"{file.parent} is of another comparison ({name} {flat[0].get(name)}, now {flat[1][name]}): "
                f"choose another --out"
            )
