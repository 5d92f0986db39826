"""A comparison: its options, and the training runs that they mean.

Each is a run directory of `retentive train` and could have been made by it; what is done is not done again.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from retentive.bench.lab.tables import known
from retentive.data.packed import Packed
from retentive.machine import pick_device
from retentive.models import preset
from retentive.models.peers import KINDS
from retentive.studies.compare.queue import Task, work
from retentive.studies.compare.records import Run, check_hardware, machines, records
from retentive.studies.compare.summary import report
from retentive.studies.compare.variants import VARIANTS, changes
from retentive.train import TrainConfig, TrainRun
from retentive.train.run import FREE


@dataclass(frozen=True)
class Comparison:
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
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: TrainConfig(steps=500, lr=2e-3, sample_every=0, keep=1)
    )

    def plan(self) -> list[Run]:
        """All runs, a seed after the other, so that what an interruption leaves is of use.

        Raises:
            ValueError: an unknown variant or size, or something given twice or not at all.
        """
        if self.train.seed != TrainConfig.seed:
            raise ValueError(f"--seed is not for comparisons, got {self.train.seed}: name them with --seeds")
        known(self.variants, VARIANTS, "variant")
        lrs = self.lrs or (self.train.lr,)
        for what, values in (("size", self.sizes), ("seed", self.seeds), ("variant", self.variants), ("lr", lrs)):
            if not values:
                raise ValueError(f"no {what} given: nothing to compare")
            if len(set(values)) < len(values):
                raise ValueError(f"a {what} is given twice: {', '.join(map(str, values))}")
        return [Run(v, size, seed, lr) for seed, size, lr, v in product(self.seeds, self.sizes, lrs, self.variants)]

    def check(self) -> None:
        """Raises what stands against the plan on this machine, before anything is written.

        Raises:
            ValueError: too little held-out text, a model that cannot be built.
            ModuleNotFoundError: a variant of another library that is not installed.
        """
        if self.jobs < 1:
            raise ValueError(f"--jobs must be at least 1, got {self.jobs}")
        runs = self.plan()
        pick_device(self.train.device)
        others = [v for v in self.variants if VARIANTS[v].model in KINDS]
        if others and not find_spec("transformers"):
            raise ModuleNotFoundError(
                f"{others[0]} is a model of the transformers library: pip install 'retentive[peers]'"
            )
        packed = Packed(self.data)
        if packed.meta.splits["valid"].tokens <= self.length:
            raise ValueError(f"{self.data} has too little held-out text for windows of {self.length} tokens")
        for run in runs:
            self.train_run(run).config(packed.meta.vocab_size)

    def train_run(self, run: Run) -> TrainRun:
        """The training run that is meant, as `retentive train` would do it."""
        return TrainRun(
            data=self.data,
            out=self.out / run.name,
            size=run.size,
            model=VARIANTS[run.variant].model,  # type: ignore[arg-type]
            set=changes(run.variant, preset(run.size, vocab_size=2)),
            mode=self.mode,
            batch=self.batch,
            length=self.length,
            resume=True,
            train=replace(self.train, lr=run.lr, seed=run.seed, sample_every=0),
        )

    def about(self, run: Run) -> dict[str, Any]:
        """All that decides what comes out of a run but its name."""
        train = {name: value for name, value in asdict(self.train_run(run).train).items() if name not in FREE}
        told = {"mode": self.mode, "batch": self.batch, "length": self.length, "train": train}
        return {"data_sha256": Packed(self.data).fingerprint, **told}

    def run(
        self, say: Callable[[str], None] = lambda line: None, progress: Callable[[str], None] = lambda line: None
    ) -> dict[str, Any]:
        """What came of all runs that are done, those that were missing trained first: see `result`.

        Args:
            say: told when a run is done, in a line.
            progress: told about once a second how far the runs under way are.

        Raises:
            Interrupted: Ctrl-C or SIGTERM; all is saved, and the same comparison goes on.
            ValueError: the plan is impossible, or results of unlike machines would stand in one table.
        """
        self.check()
        runs = self.plan()
        threads = max(1, (os.cpu_count() or 1) // self.jobs) if self.jobs > 1 else 0
        tasks = [
            Task(run, self.out / run.name, self.about(run), json.dumps([self.described(), run, threads]))
            for run in runs
        ]
        work(tasks, jobs=self.jobs, say=say, progress=progress)
        return self.result()

    def result(self) -> dict[str, Any]:
        """What came of the runs that are done: `summary.report`, the machines, and all that decided it."""
        runs = self.plan()
        found = records(self.out, runs)
        check_hardware(found, mixed=self.mixed)
        result = {"planned": len(runs), **report(found, self.variants[0])}
        if not found:
            return result
        kinds = [r["hardware"] for r in machines(found).values()]
        about = self.about(runs[0])
        return {"what": "comparison", "hardware": kinds[0], "about": about, "machines": kinds, **result}

    def described(self) -> dict[str, Any]:
        """The fields as JSON has them, for `from_description`."""
        return json.loads(json.dumps(asdict(self), default=str))

    @classmethod
    def from_description(cls, raw: dict[str, Any]) -> "Comparison":
        lists = {name: tuple(value) for name, value in raw.items() if isinstance(value, list)}
        paths = {"data": Path(raw["data"]), "out": Path(raw["out"])}
        return cls(**raw | lists | paths | {"train": TrainConfig(**raw["train"])})
