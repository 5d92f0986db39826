"""Worker of a comparison: trains and scores one run in its own process, which `queue` starts.

python -m retentive.compare.worker PARENT '[{the comparison}, [variant, size, seed, lr], precision, threads]'
"""

import json
import os
import signal
import statistics
import sys
import threading
import time
from dataclasses import replace
from typing import Any

import torch
from filelock import Timeout

import retentive
from retentive import machine
from retentive.compare.comparison import Comparison
from retentive.compare.queue import STOPPED, TAKEN, lock_of
from retentive.compare.records import RECORD, Run
from retentive.data.packed import Packed
from retentive.evals import heldout
from retentive.files import write_json
from retentive.machine import pick_device
from retentive.models import cost
from retentive.train import Interrupted
from retentive.train.config import Precision
from retentive.train.directory import read_options
from retentive.train.log import read_metrics


def train_and_score(comparison: Comparison, run: Run, precision: Precision) -> dict[str, Any]:
    """Trains and scores the run and returns its record; a loss that is not finite is a result too."""
    record = run._asdict() | {"name": run.name, "about": comparison.about(run), "hardware": machine.describe()}
    device = pick_device(comparison.train.device)
    before = machine.reset_peak_memory(device)
    training = comparison.train_run(run)
    if not read_options(training.out):  # a resumed run keeps its own
        training = replace(training, train=replace(training.train, precision=precision))
    try:
        training.run(quiet=True)
    except FloatingPointError as error:
        return record | {"failed": str(error)}
    record["memory"] = machine.peak_memory(device) - before  # before scoring, which is not part of training's cost
    return record | score(comparison, run)


def score(comparison: Comparison, run: Run) -> dict[str, Any]:
    """Returns the scores of a trained run on the held-out text, and its curves and speed of training."""
    folder, packed = comparison.out / run.name, Packed(comparison.data)
    model, _ = retentive.load(folder)
    metrics = read_metrics(folder)
    steps = [r for r in metrics if "loss" in r]
    size = comparison.batch * comparison.length * comparison.train.accumulate  # tokens of a step
    every = max(1, len(steps) // 100)  # the curve of the training loss has some 100 points, each a mean
    return {
        "config": model.config.written(),
        "parameters": cost.parameters(model.config),
        "block_parameters": cost.block_parameters(model.config),
        "tokens": len(steps) * size,
        **heldout.report(model, packed, heldout.Pairs(packed), length=comparison.length),
        "curve": [[r["step"] * size, r["bits_per_byte"]] for r in metrics if "bits_per_byte" in r],
        "train_loss": [
            [part[-1]["step"] * size, statistics.mean(r["loss"] for r in part)]
            for part in (steps[n : n + every] for n in range(0, len(steps), every))
        ],
        "tokens_per_second": statistics.median(r["tokens_per_second"] for r in steps),
    }


def end_with_the_parent(parent: int) -> None:
    """Sends SIGTERM to this process, which then saves and ends, as soon as its parent has ended."""
    # An orphan gets another parent. Polled, since only Linux can signal that; it may be an orphan from the start.
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def main(argument: str, parent: int | None = None) -> int:
    """Does the run. Returns the exit code: 0 done, TAKEN if another process has locked it, STOPPED after a signal.

    Args:
        argument: JSON of the comparison's fields, the run's fields, the precision, and the threads (0: torch's choice).
        parent: process id of the parent, with which this process ends; None for none.
    """
    raw, fields, precision, threads = json.loads(argument)
    comparison, run = Comparison.from_description(raw), Run(*fields)
    machine.keep_freed_memory()
    if threads:
        torch.set_num_threads(threads)
    if parent is not None:
        threading.Thread(target=end_with_the_parent, args=(parent,), daemon=True).start()
    folder = comparison.out / run.name
    try:
        with lock_of(folder):
            record = train_and_score(comparison, run, precision)
            folder.mkdir(exist_ok=True)
            # last, since the record marks the run as done
            write_json(folder / RECORD, record)
    except Timeout:
        return TAKEN
    except Interrupted:
        return STOPPED
    except (ValueError, OSError, ImportError) as error:
        print("retentive:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[2], int(sys.argv[1])))
