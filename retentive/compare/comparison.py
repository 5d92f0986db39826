"""A comparison: its options, and the training runs they define.

Each run is a run directory as of `retentive train`. A finished run is not repeated.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import tyro
from filelock import FileLock

from retentive.compare.queue import Task, work
from retentive.compare.records import Run, adopt, check_hardware, machines, records
from retentive.compare.summary import best_rates, report
from retentive.compare.variants import VARIANTS, Variant, changes, own_variant
from retentive.data.packed import Packed
from retentive.files import make_folder, write_text
from retentive.machine import pick_device
from retentive.models import cost
from retentive.models.peers import KINDS
from retentive.options import at_least_one, known, option
from retentive.tables import counted, duration
from retentive.train import TrainConfig, TrainRun
from retentive.train.config import Optimizer, Precision
from retentive.train.resume import FREE
from retentive.train.speed import pick_precision

LR = 2e-3
"""Learning rate of all runs where none is named."""


@dataclass(frozen=True)
class Comparison:
    """Train variants of a model on the same tokens in the same order, and compare them."""

    data: Path
    """Folder of packed tokens with held-out text."""
    out: Path
    """Folder for the runs, made if missing. Finished runs in it are not repeated."""
    variants: tuple[str, ...] = ("retnet", "transformer")
    """Names of the variants; the first is the baseline. An unknown name lists all."""
    set: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Your own variants, NAME:FIELD=VALUE,FIELD=VALUE for each, such as mine:heads=2,dropout=0.1. The field model names
    the model to change, by default retnet."""
    sizes: tuple[str, ...] = ("1m",)
    """Model sizes, as for `retentive train --size`."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of the initialisation and of the order of the text. Each variant is trained with every seed."""
    lrs: tuple[float, ...] = ()
    """Peak learning rates, by default --lr. Each variant is trained with every rate, and its best counts."""
    optimizers: tuple[Optimizer, ...] = ()
    """Optimisers, by default --optimizer. Each variant is trained with every optimiser, each at its best learning rate.
    Other optimisers become part of the variant's name: retnet+muon."""
    tune: bool = False
    """Try all learning rates with the first seed only; the other seeds use the variant's best rate."""
    mode: Literal["reset", "packed"] = "reset"
    """Mode of batches, as for `retentive train --mode`."""
    batch: int = 8
    """Rows per batch."""
    length: int = 1024
    """Tokens per row, in training and in evaluation."""
    earlier: tuple[Path, ...] = ()
    """Result files of earlier comparisons (--json). Their runs are not repeated."""
    jobs: int = 1
    """Simultaneous runs, each in a process with its share of the cores."""
    mixed: bool = False
    """Allow runs of different machines in one table."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: TrainConfig(steps=500, lr=LR, sample_every=0, keep=1)
    )

    def plan(self) -> list[Run]:
        """Returns all runs, seed by seed: stopped early, a comparison of fewer seeds is complete.

        With `tune`, runs of the other seeds have no learning rate until all rates of their size and variant are done.

        Raises:
            ValueError: a variant is unknown, or a list is empty or holds a value twice.
        """
        if self.train.seed != TrainConfig.seed:
            raise ValueError(f"{option('seed', self.train.seed)}: a comparison has several; name them in `seeds`")
        known([*self.variants, *self.set], self.models, "variant")
        again = [name for name in self.set if name in VARIANTS]
        if again:
            raise ValueError(f"`set` defines {again[0]}: that is a variant already; choose another name")
        lrs = self.lrs or (self.train.lr or LR,)
        given = {"optimizers": self.optimizers, "sizes": self.sizes, "seeds": self.seeds, "variants": self.names}
        for name, values in (given | {"lrs": lrs}).items():
            if not values and name != "optimizers":
                raise ValueError(f"`{name}` is empty: nothing to compare")
            if len(set(values)) < len(values):
                raise ValueError(f"{option(name, values)}: a value is given twice")
        for lr in lrs:
            if not 0 < lr < math.inf:  # 0 stands for a rate that is not known yet, whose runs wait
                raise ValueError(f"{option('lrs', lr)}: expected a number above 0")
        if not self.tune:
            return [Run(v, size, seed, lr) for seed, size, lr, v in product(self.seeds, self.sizes, lrs, self.names)]
        first = [Run(v, size, self.seeds[0], lr) for size, lr, v in product(self.sizes, lrs, self.names)]
        found = records(self.out, first)
        done = {record["name"] for record in found}
        rates = best_rates(record for record in found if "failed" not in record)  # none if all rates diverged
        waiting = {(run.size, run.variant): None for run in first if run.name not in done}
        later = product(self.seeds[1:], (rates | waiting).items())
        return first + [Run(v, size, seed, lr) for seed, ((size, v), lr) in later]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all variants of the comparison."""
        bare = self.variants + tuple(name for name in self.set if name not in self.variants)
        optimizers = self.optimizers or (self.train.optimizer,)
        return tuple(name if o == self.train.optimizer else f"{name}+{o}" for name, o in product(bare, optimizers))

    @property
    def models(self) -> dict[str, Variant]:
        """All known variants, by name."""
        return VARIANTS | {name: own_variant(fields) for name, fields in self.set.items()}

    @property
    def table(self) -> dict[str, Variant]:
        """All known variants, also with each of the other optimisers."""
        others = product(self.models.items(), [o for o in self.optimizers if o != self.train.optimizer])
        return self.models | {f"{name}+{o}": variant._replace(optimizer=o) for (name, variant), o in others}

    def check(self) -> None:
        """Checks that all runs are possible on this machine. Writes nothing.

        Raises:
            ValueError: there is too little held-out text, or a model cannot be built.
            FileExistsError: the folder is not empty and holds no runs.
            ModuleNotFoundError: a variant needs a library that is not installed.
        """
        at_least_one(self, "jobs", "batch", "length")
        runs = [run for run in self.plan() if run.lr]
        if self.out.is_file():
            raise FileExistsError(f"{self.out} is a file: choose a folder for the runs (`out`)")
        found = sorted(self.out.glob("[!.]*"))  # files that begin with a dot are ours: locks, the precision
        ours = {run.name for run in runs}
        if found and not any(f.name in ours or (f / "train.json").is_file() for f in found):
            raise FileExistsError(f"{self.out} holds other things ({found[0].name}): choose a new or an empty folder")
        pick_device(self.train.device)
        peers = [v for v in self.names if self.table[v].model in KINDS]
        for peer in peers:
            if (self.table[peer].optimizer or self.train.optimizer) == "muon":
                raise ValueError(f"{peer}: muon is for whole matrices, and a peer packs its own: leave it out")
        if peers and not find_spec("transformers"):  # not imported, which takes seconds
            raise ModuleNotFoundError(
                f"{peers[0]} is a model of the transformers library: pip install 'retentive[peers]'"
            )
        packed = Packed(self.data)
        if packed.media:
            raise ValueError(
                f"{self.data} holds {' and '.join(packed.media)}, and compare is for text: retentive train each of them"
            )
        if packed.meta.splits["valid"].tokens <= self.length:
            raise ValueError(
                f"{self.data} has too little held-out text for windows of {self.length} tokens: "
                "hold out more, or choose a smaller `length`"
            )
        for run in runs:
            try:
                self.train_run(run).config(packed.meta.vocab_size)  # raises now what a worker would raise hours later
            except ValueError as error:
                raise ValueError(f"variant {run.variant}, size {run.size}: {error}") from None

    def train_run(self, run: Run) -> TrainRun:
        """Returns the training run of a run of this comparison."""
        own: dict[str, Any] = {"lr": run.lr or self.train.lr, "seed": run.seed, "sample_every": 0}
        if self.table[run.variant].optimizer:
            own["optimizer"] = self.table[run.variant].optimizer
        return TrainRun(
            data=self.data,
            out=self.out / run.name,
            size=run.size,
            model=self.table[run.variant].model,  # type: ignore[arg-type]
            set=changes(self.table[run.variant], run.size),
            mode=self.mode,
            batch=self.batch,
            length=self.length,
            resume=True,  # a stopped run resumes from its checkpoint
            train=replace(self.train, **own),
        )

    def about(self, run: Run) -> dict[str, Any]:
        """Returns everything that the result of a run depends on, except what its name says."""
        train = {name: value for name, value in asdict(self.train_run(run).train).items() if name not in FREE}
        batches = {"mode": self.mode, "batch": self.batch, "length": self.length}
        return {"data_sha256": Packed(self.data).fingerprint, **batches, "train": train}

    def run(
        self, say: Callable[[str], None] = lambda line: None, progress: Callable[[str], None] = lambda line: None
    ) -> dict[str, Any]:
        """Trains and scores the missing runs, and returns the result of all: see `result`.

        Args:
            say: called with a line when a run is done.
            progress: called several times a second with a line on the current runs.

        Raises:
            Interrupted: Ctrl-C or SIGTERM. Everything is saved, and the same comparison resumes.
            ValueError: a run is impossible, or one table would mix different machines.
            ModuleNotFoundError, ChildProcessError: as `check` and `queue.work`.
        """
        self.check()
        for file in self.earlier:
            taken, total = adopt(file, self.out, {run.name for run in replace(self, tune=False).plan()})
            say(f"{file}: {taken} of its {counted(total, 'run')} have names of this comparison")
        threads = max(1, (os.cpu_count() or 1) // self.jobs) if self.jobs > 1 else 0  # 0: torch's own choice
        missing = [run for run in self.plan() if not (run.lr and self.task(run, threads).done)]
        for line in self.estimate(missing, threads):
            say(line)
        for _ in range(1 + self.tune):  # the first round finds the learning rates of the second
            tasks = [self.task(run, threads) for run in self.plan() if run.lr]
            work(tasks, jobs=self.jobs, say=say, progress=progress)
        return self.result()

    def task(self, run: Run, threads: int) -> Task:
        """Returns the queue's task for a run."""
        order = json.dumps([self.described(), run, self.precision(), threads])
        return Task(run, self.out / run.name, self.about(run), self.train_run(run).config(2), order)

    def estimate(self, runs: Sequence[Run], threads: int) -> Iterator[str]:
        """Yields a line for each variant and size on the cost of its runs, measured by a few steps, and a total."""
        counts = Counter((run.size, run.variant) for run in runs)
        first = {(run.size, run.variant): run for run in reversed(runs)}
        before, total, vocabulary = torch.get_num_threads(), 0.0, Packed(self.data).meta.vocab_size
        torch.set_num_threads(threads or before)
        try:
            for key, count in counts.items():
                training = self.train_run(first[key])
                step = replace(training, train=replace(training.train, precision=self.precision())).seconds_per_step()
                seconds, parameters = step * self.train.steps, cost.parameters(training.config(vocabulary))
                total += seconds * count
                each = f"{parameters / 1e6:.3f} M parameters, {duration(step)} a step, {duration(seconds)} a run"
                yield f"{first[key].variant} {first[key].size}: {each}, {counted(count, 'run')}"
        finally:
            torch.set_num_threads(before)
        if counts:
            yield f"{counted(len(runs), 'run')}, about {duration(total / self.jobs)} in all"

    def precision(self) -> Precision:
        """Returns the precision of every run. "auto" is measured once and kept, since runs might measure another."""
        if self.train.precision != "auto":
            return self.train.precision
        file = self.out / ".precision"
        make_folder(self.out)
        with FileLock(self.out / ".precision.lock"):
            if not file.is_file():
                write_text(file, pick_precision("auto", pick_device(self.train.device)))
            return cast(Precision, file.read_text(encoding="utf-8"))

    def result(self) -> dict[str, Any]:
        """Returns the result of the finished runs: `summary.report`, with machines and options."""
        runs = self.plan()
        found = records(self.out, [run for run in runs if run.lr])
        check_hardware(found, mixed=self.mixed)
        result = {"planned": len(runs), **report(found, self.names[0])}
        if not found:
            return result
        kinds = [r["hardware"] for r in machines(found).values()]
        about = self.about(runs[0])
        return {"what": "comparison", "hardware": kinds[0], "about": about, "machines": kinds, **result}

    def described(self) -> dict[str, Any]:
        """The fields as JSON has them, of which `from_description` makes the same comparison again."""
        return json.loads(json.dumps(asdict(self), default=str))

    @classmethod
    def from_description(cls, raw: dict[str, Any]) -> "Comparison":
        """The comparison that `described` was called on."""
        lists = {name: tuple(value) for name, value in raw.items() if isinstance(value, list)}
        paths = {"data": Path(raw["data"]), "out": Path(raw["out"]), "earlier": tuple(map(Path, raw["earlier"]))}
        return cls(**raw | lists | paths | {"train": TrainConfig(**raw["train"])})
