"""A training run as a value: its data, model, options and directory. `TrainRun(…).run()` trains it.

The command line, `compare`, the demo and the recipes all make a TrainRun; `retentive.train` is the short form.
"""

import math
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from retentive.checkpoint import ModelFolder
from retentive.checkpoint.adapter import with_adapter
from retentive.checkpoint.find import REMOTE
from retentive.data.loader import Batches, Mode
from retentive.data.mixture import MixedBatches, Mixture, open_packed
from retentive.data.packed import Packed
from retentive.machine import pick_device
from retentive.models import Config, LanguageModel, build, config_of, cost
from retentive.models.encoders import encoders_of, with_encoders
from retentive.ops import backends
from retentive.options import check_names, check_type, option
from retentive.tables import counted, millions
from retentive.train.checkpoints import folders
from retentive.train.config import TrainConfig
from retentive.train.directory import Existing, RunDirectory, read_options
from retentive.train.distillation import Learns, check_whole, distillation
from retentive.train.hooks import Callback, Hooks, hooks_on
from retentive.train.initial import (
    adapter_for,
    check_fits,
    check_taps,
    check_vocabulary,
    encoders_for,
    freeze_others,
    load_base,
    load_initial,
)
from retentive.train.log import say
from retentive.train.loop import train
from retentive.train.objective import Objective, check_calls, language_modelling
from retentive.train.parallel import ALONE, Cluster, Parallel, checksum
from retentive.train.parallel.rendezvous import joined, several
from retentive.train.prepare import prepare
from retentive.train.resume import FREE, changes_of, check_unchanged, plain
from retentive.train.step import take_step
from retentive.train.texts import Shown, filled, is_text, packed

Data = Packed | Mixture


@dataclass(frozen=True)
class TrainRun:
    """Train a RetNet (or its Transformer twin) on text, or on data that `retentive data` has packed."""

    data: Path | tuple[Path, ...]
    """Folder of packed tokens, or several folders whose rows are mixed. Or a file or folder of text, which is packed
    into a folder beside the run (OUT-data-…)."""
    out: Path
    """Run directory to create."""
    data_weights: tuple[float, ...] = ()
    """Mixing weight of each data folder, in the same order; only the ratios matter. Default: proportional to its
    tokens. Each is evaluated by itself as well."""
    size: str = "5m"
    """Model size: 1m, 2m, 5m, 10m, 25m, 60m, 130m, 350m (parameters of the blocks), or a published one (retentive info
    --sizes)."""
    model: Literal[
        "retnet",
        "retnet-portable",
        "retnet-paper",
        "torchscale",
        "fla",
        "transformer",
        "hybrid",
        "llama",
        "mamba",
        "mamba2",
        "rwkv",
    ] = "retnet"
    """Architecture. A RetNet: ours, one that llama.cpp runs too (portable), the paper's, torchscale's or fla's. Or a
    model of the same width and parameter count: its Transformer twin, a hybrid of both, or a peer (extra `peers`)."""
    set: Mapping[str, Any] = field(default_factory=dict)
    """Changes to the model's config, such as decay=paper heads=2 dropout=0.1, and to its encoders' configs, such as
    image.layers=4."""
    init: str = ""
    """Model folder to start from, a run or a converted model: gives the weights and the architecture instead of a
    size."""
    lora: int = 0
    """Rank of a LoRA adapter of the initial model; only the adapter is trained and saved. 0 trains all weights, which a
    quantised model does not allow."""
    lora_alpha: float = 16.0
    """LoRA alpha: the adapter is scaled by alpha / rank."""
    lora_targets: str = "all"
    """Matrices that the LoRA adapter changes: all, or some, such as q_proj,v_proj."""
    teacher: str = ""
    """Model folder of a teacher with the same tokenizer (distillation): the model learns from it instead of from the
    text."""
    learns: Learns = "predictions"
    """With a teacher: its predictions, or the outputs of its mixers, layer by layer."""
    only: tuple[str, ...] = ()
    """Train only weights whose names contain one of these, such as retention. Default: all."""
    mode: Mode | Literal["auto"] = "reset"
    """reset: the state is reset at each document's end. packed: documents run into each other. whole: rows of whole
    documents or conversations. carry: each row continues the one before, with its state. auto: whole for models with
    attention and for data with pictures or sound, else carry."""
    batch: int = 8
    """Batch size in rows."""
    length: int = 512
    """Context length: tokens of a row."""
    epochs: float = 0.0
    """Passes over the data, in the place of a number of steps; 0 for none."""
    resume: bool = False
    """Resume from the run's newest checkpoint, if it has one, with the run's own options. A larger number of steps
    lengthens the run."""
    overwrite: bool = False
    """Begin anew if the directory holds a run: its checkpoints and its log are deleted."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    parallel: Annotated[Parallel, tyro.conf.arg(name="")] = field(default_factory=Parallel)
    """Mesh of several processes. A resumed run may have another number of processes."""

    @classmethod
    def of(cls, data: str | Path | Sequence[str | Path], out: str | Path, **options: Any) -> "TrainRun":
        """Make a run from keywords: fields of TrainRun, TrainConfig or Parallel.

        Raises:
            TypeError: an unknown keyword, or a value of the wrong type.
        """
        parts = {f.name: f.default_factory() for f in fields(cls) if f.name in PARTS}
        known = {f.name for kind in (cls, *parts.values()) for f in fields(kind)} - {"data", "out", *PARTS}
        check_names("a training run", options, known)
        return cls(data, Path(out), **nested(parts, options))  # type: ignore[arg-type]  # made paths of there

    def __post_init__(self):
        # strings and lists are accepted too; a frozen dataclass needs object.__setattr__
        several = (self.data,) if isinstance(self.data, str | Path) else self.data
        paths = tuple(map(Path, several))
        object.__setattr__(self, "data", paths[0] if len(paths) == 1 else paths)
        object.__setattr__(self, "data_weights", tuple(self.data_weights))
        object.__setattr__(self, "out", Path(self.out))
        if isinstance(self.init, Path):
            object.__setattr__(self, "init", str(self.init))
        for f in fields(TrainRun):
            if isinstance(f.default, bool | int | float | str):
                check_type(f.name, getattr(self, f.name), type(f.default))
        check_type("set", self.set, Mapping)
        if self.lora < 0:
            raise ValueError(f"`lora` must be at least 0, the rank of an adapter, got {self.lora}")
        object.__setattr__(self, "only", tuple(self.only))
        if not self.teacher and self.learns != TrainRun.learns:
            raise ValueError(f"`learns` is of a teacher: name one (`teacher`), got learns={self.learns!r} alone")
        if self.only and self.lora:
            raise ValueError("`lora` trains an adapter only: leave out `only`")
        if self.lora and not self.init:
            raise ValueError("`lora` changes a model that is trained already: name it (`init`)")
        if not self.lora and (self.lora_alpha, self.lora_targets) != (TrainRun.lora_alpha, TrainRun.lora_targets):
            raise ValueError("`lora_alpha` and `lora_targets` are of an adapter: give its rank too (`lora`)")
        if not 0 <= self.epochs < math.inf:
            raise ValueError(f"`epochs` must be at least 0 and finite, got {self.epochs}")

    def run(
        self,
        *,
        overrides: Collection[str] | None = None,
        quiet: bool = False,
        shown: Shown = nullcontext,
        objective: Objective | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> Path:
        """Train the model and return the run directory.

        Args:
            overrides: names of the fields that the user chose, for a resumed run. They must equal those of the run on
                disk, except for `steps` and FREE; all other fields are taken from that run. If not given, all fields
                count as chosen, and `steps` must equal the run's as well.
            quiet: print nothing on stderr.
            shown: makes a context that shows the progress of packing texts, such as a bar; it gives the progress
                callback.
            objective: your own loss, in place of language modelling (`objective.Objective`).
            callbacks: called with the training and the step's metrics after every step; an error in one is raised
                after a checkpoint.

        Raises:
            ValueError: data, model and options do not fit each other, or the run does not fit into memory.
            FileExistsError, BlockingIOError, FloatingPointError, Interrupted, OSError: as `loop.train`.
        """
        with joined(self.parallel, self.train.device) as cluster:
            with cluster.barrier():
                self.check()
                check_calls(objective, callbacks)
                run = self.on_packed(shown, quiet=quiet)
                data = run.opened()
                run = run.settled(data, overrides, quiet=quiet)
                batches, directory = run.batches(data, cluster), run.directory(data)
                config, model = run.build(data, cluster)
                if objective and self.teacher:
                    raise ValueError("`teacher` is an objective: leave out either it or your own")
                objective = objective or run.objective(data, cluster)
                title = run.title(data, model, cluster)
            if self.resume and cluster.main and not folders(self.out):
                there = "has no checkpoint yet" if read_options(self.out) else "is not there"
                say(f"the run at {self.out} {there}: beginning it", quiet=quiet)
            same = (run.options, run.existing, directory.record["data_sha256"], model.config)
            cluster.check_same(same, "rank {} was started with other options or data than rank 0: give all the same")
            if cluster.sharded:  # replicas get the weights of rank 0
                other = "rank {} begins with other weights than rank 0 (`init`, or another version of torch)"
                cluster.check_same(checksum(model), other)
            hooks = replace(run.hooks(data, config), callbacks=callbacks, title=title, quiet=quiet)
            return train(model, batches, objective, run.train, directory, hooks, cluster)

    def on_packed(self, shown: Shown = nullcontext, *, quiet: bool = False) -> "TrainRun":
        """The run on packed folders: all files and folders of text are packed into one beside the run, once.

        Their tokenizer is that of the initial model, or of a packed folder among the data, or a new one.

        Raises:
            ValueError, OSError: as `texts.packed`; or there are several processes, or weights of the texts.
        """
        sources = self.data if isinstance(self.data, tuple) else (self.data,)
        if absent := [path for path in sources if not path.exists()]:
            raise FileNotFoundError(f"{absent[0]} does not exist: name a text, a folder of texts, or packed data")
        texts, others = ([path for path in sources if is_text(path) == wanted] for wanted in (True, False))
        if not texts:
            return self
        if several():
            raise ValueError("texts are packed by one process: pack them first (retentive data), then train on that")
        if self.data_weights:
            raise ValueError("`data_weights` are of packed folders: pack each text first (retentive data)")
        tokenizer = str(self.base.path if self.init else others[0] if others else "train")
        made = packed(texts, self.out, tokenizer=tokenizer, shown=shown, quiet=quiet)
        return replace(self, data=(*others, made))

    def check(self) -> None:
        """Check everything that needs no data; raises ValueError or OSError. Changes nothing."""
        if self.resume and self.overwrite:  # not in __post_init__: the parser would print that error in a box
            raise ValueError("`resume` and `overwrite` exclude each other: go on with the run, or begin anew")
        if self.init and not self.init.startswith(REMOTE) and self.out.resolve() == Path(self.init).resolve():
            raise ValueError(f"{option('out', self.out)} is the model that the run begins with: choose another folder")
        if self.teacher and self.mode == "carry":
            raise ValueError("`teacher` reads every row from its beginning: use another mode than carry")
        if self.batch < 1 or self.length < 1:
            raise ValueError(f"{option('batch', self.batch)}, {option('length', self.length)}: each must be at least 1")
        pick_device(self.train.device)
        if not (self.init or self.resume):
            self.config(2)  # no field depends on the vocabulary
        RunDirectory(self.out, existing=self.existing).check()
        if self.init and not self.resumes:
            if self.lora and self.base.adapter:
                raise ValueError(
                    f"{self.init} is an adapter itself: merge it first (retentive convert {self.init} OUT)"
                )
            if self.base.quantization and not self.lora:
                raise ValueError(
                    f"{self.init} is quantised: train an adapter on it (`lora`), or the model that it was quantised "
                    "from"
                )

    @cached_property
    def base(self) -> ModelFolder:
        """The model folder to begin with, of a run that has one; errors as `ModelFolder.open`."""
        return ModelFolder.open(self.init)

    @property
    def existing(self) -> Existing:
        """Action if the directory already holds a run."""
        return "resume" if self.resume else "overwrite" if self.overwrite else "refuse"

    @property
    def resumes(self) -> bool:
        """True if there is a checkpoint to go on from."""
        return self.resume and bool(folders(self.out))

    @property
    def options(self) -> dict[str, Any]:
        """All options that determine the training, by name: those of TrainRun and TrainConfig, without the folders."""
        own = {f.name: getattr(self, f.name) for f in fields(TrainRun) if f.name not in APART}
        return own | {f.name: getattr(self.train, f.name) for f in fields(self.train)}

    def settled(self, data: Data, overrides: Collection[str] | None = None, *, quiet: bool = True) -> "TrainRun":
        """The run with every option settled: steps for epochs, a mode for auto, rows that little text can fill unless
        the user chose their size, and a resumed run's own options.

        A run without a checkpoint may change every option. The data folder may have been moved, but its
        content must be the same.

        Raises:
            ValueError: an option that may not change, other data, or a damaged train.json.
        """
        typed = set(overrides or ())
        chosen = set(self.options) if overrides is None else typed & set(self.options)
        saved = read_options(self.out) if self.resume else {}
        by_steps = overrides is not None and "epochs" not in typed and bool("steps" in typed or saved)
        fixed = {"batch", "length"} if overrides is None or saved else typed
        run = self.concrete(data, by_steps=by_steps, fixed=fixed)
        if (run.batch, run.length) != (self.batch, self.length):
            say(f"little text: {run.batch} x {run.length} a batch, not {self.batch} x {self.length}", quiet=quiet)
        free = FREE if overrides is None and not self.epochs else FREE | {"steps"}
        if self.epochs and "epochs" in typed:
            chosen.add("steps")
        if saved:
            run = run._as_resumed(saved, data.fingerprint, chosen, free)
        if run.init and {"size", "model"} & typed:
            raise ValueError(both_architectures(run.init))
        return run

    def concrete(
        self, data: Data, *, by_steps: bool = False, fixed: Collection[str] = ("batch", "length")
    ) -> "TrainRun":
        """The run with steps for epochs, a mode for auto, a learning rate for a trained model, and rows that the text
        can fill.

        Args:
            by_steps: keep the steps and ignore the epochs.
            fixed: names of fields that little text does not change.
        """
        run = self
        if self.mode == "auto":
            config = ModelFolder.open(self.out).config if self.resumes else self.config(data.meta.vocab_size)
            run = replace(self, mode="whole" if data.media or config.library or config.attends else "carry")
        if self.init and not (self.train.lr or self.resumes):
            run = replace(run, train=replace(run.train, lr=FURTHER))
        if run.mode != "whole":
            tokens = min(part.meta.splits["train"].tokens for part in parts_of(data))
            batch, length = filled(run.batch, run.length, tokens, fixed, carry=run.mode == "carry")
            run = replace(run, batch=batch, length=length)
        if self.epochs and not by_steps:
            steps = math.ceil(self.epochs * run.batches(data).steps_per_epoch / self.train.accumulate)
            run = replace(run, train=replace(run.train, steps=max(1, steps)))
        return replace(run, epochs=0.0)

    def _as_resumed(self, saved: Mapping[str, Any], fingerprint: str, chosen: Collection[str], free: Any) -> "TrainRun":
        """The run at `out`, whose train.json is `saved`; of the `chosen` options, only `free` ones may change."""
        chosen, kept = set(chosen), folders(self.out)
        try:
            own = {**saved["command"], "data": self.data, "out": self.out, "set": changes_of(saved["command"]["set"])}
            before = type(self)(**own, train=TrainConfig(**saved["train"]), resume=True, parallel=self.parallel)
            same_data = saved["data_sha256"] == fingerprint
        except (ValueError, KeyError, TypeError) as error:
            file = self.out / "train.json"
            raise ValueError(f"{file} does not hold a run's options ({error}): it cannot go on") from None
        if not kept:
            free = chosen
        elif before.lora:
            free = free | {"init"}  # `load_base` checks it by its weights
        if kept and not same_data:
            raise ValueError(
                f"{option('data', self.data)} holds other data than the run at {self.out} was trained on: name those, "
                "in their order"
            )
        check_unchanged(self.options, before.options, chosen - free, self.out)
        done = int(kept[-1].name.removeprefix("step-")) if kept else 0
        if "steps" in chosen & free and self.train.steps < done:
            steps = option("steps", self.train.steps)
            raise ValueError(f"{steps} is less than the {done} that the run at {self.out} has done")
        changes = {name: self.options[name] for name in chosen & free}
        return replace(before, **nested({name: getattr(before, name) for name in PARTS}, changes))

    def seconds_per_step(self) -> float:
        """Median seconds of a step of this run on this machine, measured on a few steps. Writes nothing."""
        data = self.opened()
        run = self.concrete(data)
        _, model = run.build(data)
        training = prepare(model, run.batches(data), run.objective(data), run.train)
        times = []
        for _ in range(50):  # leaves out the first step, which allocates and compiles; measures many short steps
            began = time.perf_counter()
            take_step(training)
            times.append(time.perf_counter() - began)
            if len(times) > 3 and sum(times[1:]) > 2:
                break
        return statistics.median(times[1:])

    def opened(self) -> Data:
        """Open the data folder, or several as a mixture; raises ValueError or FileNotFoundError if it cannot."""
        return open_packed(self.data if isinstance(self.data, tuple) else (self.data,), self.data_weights)

    def batches(self, data: Data, cluster: Cluster = ALONE) -> Batches | MixedBatches:
        """The training batches in order; with several ranks, the rows that this rank reads.

        Raises:
            ValueError: the rows cannot be divided over the data parallel ranks, or their tokens over the ranks of `cp`.
        """
        dp, cp = cluster.dp, cluster.cp
        if self.batch % dp.size:
            raise ValueError(
                f"{option('batch', self.batch)} is not divisible by the {dp.size} ranks that read different rows "
                "(`dp_replicate` x `dp_shard`): change either"
            )
        if cp.size > 1 and self.mode == "carry":
            raise ValueError(f"`cp={cp.size}` divides rows that begin in their batch: use another mode than carry")
        if self.length < 1:
            raise ValueError(f"{option('length', self.length)}: must be at least 1")
        if self.length < cp.size:
            raise ValueError(
                f"{option('length', self.length)} is shorter than `cp={cp.size}`: each rank needs a token of it"
            )
        how: dict[str, Any] = {"mode": self.mode, "batch": self.batch, "length": self.length, "seed": self.train.seed}
        return data.batches(**how, rank=dp.rank, world=dp.size)

    def config(self, vocab_size: int) -> Config:
        """Config of the model for a vocabulary size; with `init`, the config of that model.

        Raises:
            ValueError: an unknown size or field, an architecture given together with `init`, or a convolution longer
                than a row.
        """
        own = {name: value for name, value in self.set.items() if "." not in name}
        if not self.init:
            config = config_of(self.model, self.size, vocab_size=vocab_size, **own)
            check_taps(config, self.length)
            return config
        if (self.size, self.model) != (TrainRun.size, TrainRun.model):  # a field's default is the class's attribute
            raise ValueError(both_architectures(self.init))
        if set(own) - {"dropout"}:
            raise ValueError(f"{option('init', self.init)} brings its architecture: only dropout can be in `set`")
        return replace(self.base.config, **own)

    def build(self, data: Data, cluster: Cluster = ALONE) -> tuple[Config, LanguageModel]:
        """Build the initial (config, model).

        Raises:
            ValueError: the model does not fit the data, the mode or the memory; checked before it is made.
        """
        # A resumed run uses its own config and weights: its initial model may be gone, and defaults may have changed
        # since it began.
        begun = ModelFolder.open(self.out) if self.resumes else None
        config = begun.config if begun else self.config(data.meta.vocab_size)
        if self.mode == "carry" and not (config.keeps_state and config.constant_state):
            raise ValueError(
                f"mode carry hands on a state of constant size, and a {config.name} has none: use another mode, or "
                "attention with a window"
            )
        if not cluster.sharded:  # there is no estimate of the memory of a part of a model
            check_fits(config, self.batch // cluster.dp.size, self.length, self._device(cluster))
        torch.manual_seed(self.train.seed)  # for the initialisation; each step has its own seed
        encoders = begun.encoders if begun else encoders_for(data, self.base if self.init else None, self.set)
        if encoders and config.library:
            raise ValueError(f"a {config.name} reads ids alone, and {data.path} holds {', '.join(encoders)}")
        model = build(config)
        if encoders:
            with_encoders(model, encoders)
        if self.init and not begun:
            model = load_initial(model, self.base, data, lora=bool(self.lora))
        elif self.lora:  # the checkpoint holds the adapter only
            model = load_base(model, self.base, self.out)
        if self.lora:
            model = with_adapter(model, adapter_for(model, self.base, self.lora, self.lora_alpha, self.lora_targets))
        if only := self.only or (tuple(set(config.kinds)) if self.learns == "mixers" else ()):
            freeze_others(model, only)
        return config, model

    def objective(self, data: Data, cluster: Cluster = ALONE) -> Objective:
        """Language modelling, or learning from the teacher.

        Raises:
            ValueError: the teacher has another tokenizer than the data, or fewer tokens; or the mesh divides what
                student and teacher compare.
        """
        if not self.teacher:
            return language_modelling
        teacher = ModelFolder.open(self.teacher)
        check_vocabulary(teacher, data)
        check_whole(cluster, self.learns)
        return distillation(teacher.model(device=str(self._device(cluster))), self.learns)

    def hooks(self, data: Data, config: Config) -> Hooks:
        """Hooks with evaluation if the data hold out text, and samples if the model can decode."""
        return hooks_on(data, self.length, self.train, carry=self.mode == "carry", decodes=config.keeps_state)

    def title(self, data: Data, model: LanguageModel, cluster: Cluster) -> str:
        """First line of the log."""
        encoding = sum(p.numel() for encoder in encoders_of(model).values() for p in encoder.parameters())
        senses = f" and {millions(encoding)} of encoders" if encoding else ""
        device = self._device(cluster)
        where = f"{cluster.world_size} x {device.type} ({cluster.described()})" if cluster.world_size > 1 else device
        what = self.init or f"{self.model} {self.size}"
        title = (
            f"{what}: {millions(cost.parameters(model.config))} parameters{senses}, {amount(data)}, "
            f"{self.batch} x {self.length} a batch, {counted(self.train.steps, 'step')} on {where}"
        )
        if "faster" in (backend := backends.describe(device)):  # such as no C compiler
            title += f", retention by {backend}"
        return title

    def directory(self, data: Data) -> RunDirectory:
        """Run directory, with the record that train.json keeps to resume the run."""
        options = {f.name: getattr(self, f.name) for f in fields(TrainRun) if f.name not in ("data", "out", *APART)}
        options = {"data": self.data, "out": self.out, **options}
        record = {"command": plain(options), "data_sha256": data.fingerprint}
        template = data.template.source if data.template else None
        if template is None and self.init and not self.resumes:  # a resumed run has its own
            template = self.base.template_source
        return RunDirectory(self.out, data.tokenizer, template, record, self.existing)

    def _device(self, cluster: Cluster) -> torch.device:
        return cluster.device or pick_device(self.train.device)


PARTS = ("train", "parallel")
"""Fields of TrainRun that are dataclasses themselves; their fields are options of the run."""
FURTHER = 1e-3
"""Learning rate of a model that is trained already (`init`)."""
APART = ("data", "out", "epochs", "resume", "overwrite", *PARTS)
"""Fields that do not determine the training."""


def parts_of(data: Data) -> list[Packed]:
    """The packed folders of the data."""
    return list(data.parts.values()) if isinstance(data, Mixture) else [data]


def nested(parts: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as arguments of TrainRun: fields of one of its `parts` are moved into that part."""
    found = dict(options)
    for name, part in parts.items():
        own = {f.name: found.pop(f.name) for f in fields(part) if f.name in found}
        found[name] = replace(part, **own)
    return found


def amount(data: Data) -> str:
    """Number of training tokens as text, and each folder's share of the rows of a mixture."""
    tokens = f"{millions(data.meta.splits['train'].tokens)} tokens"
    if not isinstance(data, Mixture):
        return tokens
    return f"{tokens} ({', '.join(f'{share:.1%} {name}' for name, share in data.shares.items())})"


def both_architectures(init: str) -> str:
    """Error for a model folder together with a size."""
    return f"{option('init', init)} brings its architecture: leave out `size` and `model`"
