"""One run of a comparison, trained and scored in this process, which is made for it.

python -m retentive.studies.compare.worker PARENT '[{the comparison}, [variant, size, seed, lr], threads]'
"""

import json
import os
import signal
import statistics
import sys
import threading
import time
from typing import Any

import torch
from filelock import Timeout

import retentive
from retentive import machine
from retentive.data.packed import Packed
from retentive.evals import heldout
from retentive.files import write_json
from retentive.machine import pick_device
from retentive.models import cost
from retentive.studies.compare.comparison import Comparison
from retentive.studies.compare.queue import STOPPED, TAKEN, Task
from retentive.studies.compare.records import RECORD, Run
from retentive.train import Interrupted
from retentive.train.log import read_metrics


def train_and_score(comparison: Comparison, run: Run) -> dict[str, Any]:
    """What came of the run: its record. A loss that is not a number is something that came of it too."""
    record = run._asdict() | {"name": run.name, "about": comparison.about(run), "hardware": machine.describe()}
    device = pick_device(comparison.train.device)
    before = machine.reset_peak_memory(device)
    try:
        comparison.train_run(run).run(quiet=True)
    except FloatingPointError as error:
        return record | {"failed": str(error)}
    record["memory"] = machine.peak_memory(device) - before  # of training: scoring is no part of its cost
    return record | score(comparison, run)


def score(comparison: Comparison, run: Run) -> dict[str, Any]:
    """How well a trained run does on the held-out text, and how its training went."""
    folder, packed = comparison.out / run.name, Packed(comparison.data)
    model, _ = retentive.load(folder)
    metrics = read_metrics(folder)
    steps = [r for r in metrics if "loss" in r]
    size = comparison.batch * comparison.length * comparison.train.accumulate
    every = max(1, len(steps) // 100)
    return {
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
    """SIGTERM to this process, which saves then, as soon as the one that started it is gone."""
    while os.getppid() == parent:  # it may have gone while this one was still importing
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def main(order: str, parent: int | None = None) -> int:
    """Exit code: 0 done, TAKEN where another process is at the run, STOPPED where a signal came (all is saved)."""
    raw, fields, threads = json.loads(order)
    comparison, run = Comparison.from_description(raw), Run(*fields)
    machine.keep_freed_memory()
    if threads:
        torch.set_num_threads(threads)
    if parent is not None:
        threading.Thread(target=end_with_the_parent, args=(parent,), daemon=True).start()
    folder = comparison.out / run.name
    try:
        with Task(run, folder, {}, "").lock:
            record = train_and_score(comparison, run)
            folder.mkdir(exist_ok=True)
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
