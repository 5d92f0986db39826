"""A training run as a value: its data, model, options and directory. `TrainRun(…).run()` carries it out.

The command line, `compare`, the demo and the recipes all make one of these; `retentive.train` is the short form.
Below the class: what is checked before a run. Resuming one is `resume.py`.
"""

import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from retentive import machine
from retentive.checkpoint.adapter import targets_of, weights_sha256, with_adapter
from retentive.checkpoint.io import find, load, load_adapter, load_config, load_encoders, load_quantization
from retentive.data.loader import Batches, Mode
from retentive.data.mixture import MixedBatches, Mixture, open_packed
from retentive.data.packed import Packed
from retentive.data.templates import template_of
from retentive.data.tokenizer import Tokenizer
from retentive.evals.heldout import HeldOut, held_out_loss, mixture_loss
from retentive.layers.lora import Adapter
from retentive.machine import pick_device
from retentive.models import Config, LanguageModel, build, config_of, cost
from retentive.models.encoders import CONFIGS as ENCODERS
from retentive.models.encoders import Config as Encoder
from retentive.models.encoders import config_for, encoders_of, with_encoders
from retentive.ops import backends
from retentive.options import check_names, check_type
from retentive.train.checkpoints import folders
from retentive.train.config import TrainConfig
from retentive.train.directory import Existing, RunDirectory, read_options
from retentive.train.loop import Hooks, pick_precision, take_step, train, wrap_blocks
from retentive.train.objective import language_modelling
from retentive.train.optim import optimizer_of
from retentive.train.parallel import Parallel, checksum
from retentive.train.processes import ALONE, Processes, started
from retentive.train.resume import options_of, plain, resumed, with_options
from retentive.train.samples import sample_answer, sample_text

Data = Packed | Mixture


@dataclass(frozen=True)
class TrainRun:
    """Train a RetNet (or its Transformer twin) on data that `retentive data` has packed."""

    data: Path | tuple[Path, ...]
    """Folder of packed tokens; or several, whose rows are mixed (--data-weights)."""
    out: Path
    """Run directory to make."""
    data_weights: tuple[float, ...] = ()
    """What of all rows is of each of several folders, in their order, in any unit; without, in proportion to their
    tokens. Each is evaluated by itself as well."""
    size: str = "5m"
    """1m, 2m, 5m, 10m, 25m, 60m, 130m, 350m (parameters of the blocks), or a published one (retentive info --sizes)."""
    model: Literal[
        "retnet", "retnet-paper", "torchscale", "fla", "transformer", "hybrid", "llama", "mamba", "mamba2", "rwkv"
    ] = "retnet"
    """A RetNet: ours, the paper's, or torchscale's or fla's. Or, as wide and with as many parameters: its Transformer
    twin, a hybrid of both, or a peer (extra `peers`)."""
    set: Mapping[str, Any] = field(default_factory=dict)
    """Changes to the model's config, such as decay=paper heads=2 dropout=0.1, and to its encoders', such as
    image.layers=4."""
    init: str = ""
    """Model folder to train on from, a run or a converted model: its weights and architecture in place of a size's."""
    lora: int = 0
    """Train a low-rank change of this rank of the model at --init, and save that alone (LoRA); 0 trains all of it."""
    lora_alpha: float = 16.0
    """The change is multiplied by this over its rank."""
    lora_targets: str = "all"
    """The matrices that it changes: all, or some, such as q_proj,v_proj."""
    mode: Mode = "reset"
    """reset: no state passes a document's end. packed: documents run into each other. whole: rows of whole documents,
    or conversations. carry: each row reads on."""
    batch: int = 8
    """Rows of a batch."""
    length: int = 512
    """Tokens of a row."""
    resume: bool = False
    """Go on from the run's newest checkpoint, if it has one, with its own options; other --steps make it longer."""
    overwrite: bool = False
    """Begin anew where there is a run at --out: its checkpoints and its log are deleted."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    parallel: Annotated[Parallel, tyro.conf.arg(name="")] = field(default_factory=Parallel)
    """How several processes share the work. A resumed run may have another number of them."""

    @classmethod
    def of(cls, data: str | Path | Sequence[str | Path], out: str | Path, **options: Any) -> "TrainRun":
        """A run from keywords, which are fields of TrainRun, of TrainConfig or of Parallel.

        Raises:
            TypeError: a keyword that none has, or a value of another type than the field's.
        """
        inner = {f.name for kind in (TrainConfig, Parallel) for f in fields(kind)}
        known = {f.name for f in fields(cls)} - {"data", "out", "train", "parallel"} | inner
        check_names("a training run", options, known)
        return with_options(cls(data, Path(out)), options)  # type: ignore[arg-type]  # made paths of there

    def __post_init__(self):
        # strings are welcome too, and lists; a frozen dataclass wants this way
        several = (self.data,) if isinstance(self.data, str | Path) else self.data
        paths = tuple(map(Path, several))
        object.__setattr__(self, "data", paths[0] if len(paths) == 1 else paths)
        object.__setattr__(self, "data_weights", tuple(self.data_weights))
        object.__setattr__(self, "out", Path(self.out))
        if isinstance(self.init, Path):
            object.__setattr__(self, "init", str(self.init))
        for f in fields(self):
            if f.default is not MISSING:
                check_type(f.name, getattr(self, f.name), type(f.default))
        check_type("set", self.set, Mapping)
        if self.lora < 0:
            raise ValueError(f"lora must be at least 0, the rank of a change, got {self.lora}")
        if self.lora and not self.init:
            raise ValueError("--lora changes a model that is trained already: name it (--init)")
        if not self.lora and (self.lora_alpha, self.lora_targets) != (TrainRun.lora_alpha, TrainRun.lora_targets):
            raise ValueError("--lora-alpha and --lora-targets are of --lora RANK: give that too")

    def run(self, *, overrides: Collection[str] | None = None, quiet: bool = False) -> Path:
        """The run directory, once the model is trained.

        Args:
            overrides: where a run is resumed, the names of the fields that the user has chosen, and not left at their
                defaults. They must be as in the run on disk, but for `steps` and for FREE; all others are taken from
                it. If not given, all fields count as chosen, and `steps` must be as in the run as well.
            quiet: nothing on stderr.

        Raises:
            ValueError: data, model or options that do not go together; what cannot fit into memory.
            FileExistsError, BlockingIOError, FloatingPointError, Interrupted, OSError: as `loop.train`.
        """
        with started(self.parallel.sizes, self.train.device, self.parallel.patience) as here:
            with here.together():
                run, model, batches, directory, hooks = self._ready(overrides, here)
            same = (options_of(run), run.existing, directory.record["data_sha256"], model.config)
            here.check_same(same, "process {} was started with other options or data than process 0: give all the same")
            if here.divided:  # replicas get the weights of the first one
                other = "process {} begins with other weights than process 0 (--init, or another version of torch)"
                here.check_same(checksum(model), other)
            return train(model, batches, language_modelling, run.train, directory, replace(hooks, quiet=quiet), here)

    def _ready(
        self, overrides: Collection[str] | None, here: Processes
    ) -> tuple["TrainRun", LanguageModel, Batches | MixedBatches, RunDirectory, Hooks]:
        """The run as it goes on, and all that `train` needs for it; raises for what can be refused before it begins."""
        if self.resume and self.overwrite:  # not when it is made: the parser would put the line into a box of its own
            raise ValueError("resume and overwrite exclude each other: go on with the run, or begin anew")
        if self.init and not self.init.startswith("hf:") and self.out.resolve() == Path(self.init).resolve():
            raise ValueError(f"--out {self.out} is the model that the run begins with: choose another folder")
        data = self.opened()
        saved = read_options(self.out) if self.resume else {}
        run = resumed(self, saved, data.fingerprint, overrides) if saved else self
        if run.init and {"size", "model"} & set(overrides or ()):
            raise ValueError(both_architectures(run.init))
        batches, directory = run.batches(data, here), run.directory(data)
        directory.check()  # the loop does so too, but building a large model takes long
        config, model = run.build(data, here)
        what = run.init or f"{run.model} {run.size}"
        encoding = sum(p.numel() for encoder in encoders_of(model).values() for p in encoder.parameters())
        senses = f" and {encoding / 1e6:.1f} M of encoders" if encoding else ""
        device = here.device or pick_device(run.train.device)
        title = (
            f"{what}: {cost.parameters(config) / 1e6:.1f} M parameters{senses}, {amount(data)}, "
            f"{run.batch} x {run.length} a batch, {run.train.steps} steps on {here.described(device)}"
        )
        if "faster" in (backend := backends.describe(device)):  # such as no C compiler
            title += f", retention by {backend}"
        return run, model, batches, directory, replace(run.hooks(data, config), title=title)

    @property
    def existing(self) -> Existing:
        """What is done where a run is there already."""
        return "resume" if self.resume else "overwrite" if self.overwrite else "refuse"

    def seconds_per_step(self) -> float:
        """Seconds of a step of this run on this machine: the median of three, or of two seconds. Writes nothing."""
        data = self.opened()
        config = replace(self.train, precision=pick_precision(self.train.precision, pick_device(self.train.device)))
        batches, (_, model) = self.batches(data), self.build(data)
        model.to(pick_device(config.device)).train()
        wrap_blocks(model, config)
        optimizer, carried, times = optimizer_of(model, config), None, []
        for step in range(50):  # the first one allocates and compiles, and is left out; short ones vary, and are many
            began = time.perf_counter()
            _, carried = take_step(model, batches, language_modelling, config, optimizer, step, carried)
            times.append(time.perf_counter() - began)
            if len(times) > 3 and sum(times[1:]) > 2:
                break
        return statistics.median(times[1:])

    def opened(self) -> Data:
        """The folder of data, or several as one; raises ValueError or FileNotFoundError where it cannot be."""
        return open_packed(self.data if isinstance(self.data, tuple) else (self.data,), self.data_weights)

    def batches(self, data: Data, here: Processes = ALONE) -> Batches | MixedBatches:
        """The batches that are trained on, in order; of several processes the rows that this one reads.

        Raises:
            ValueError: rows that do not divide by the processes that read different ones, or among those of --cp.
        """
        if self.batch % here.dp:
            raise ValueError(
                f"--batch {self.batch} is not divisible by the {here.dp} processes that read different rows "
                f"(dp_replicate x dp_shard): change either"
            )
        if here.cp > 1 and self.mode == "carry":
            raise ValueError(f"--cp {here.cp} divides rows that begin in their batch: use another mode than carry")
        if self.length < here.cp:
            raise ValueError(f"--length {self.length} is shorter than --cp {here.cp}: each process needs a token of it")
        how: dict[str, Any] = {"mode": self.mode, "batch": self.batch, "length": self.length, "seed": self.train.seed}
        return data.batches(**how, rank=here.dp_rank, world=here.dp)

    def config(self, vocab_size: int) -> Config:
        """The config of the model for a vocabulary; with `init`, that of the model there.

        Raises:
            ValueError: no such size or field, or an architecture beside that of `init`.
        """
        own = {name: value for name, value in self.set.items() if "." not in name}
        if not self.init:
            return config_of(self.model, self.size, vocab_size=vocab_size, **own)
        if (self.size, self.model) != (TrainRun.size, TrainRun.model):  # a field's default is the class's attribute
            raise ValueError(both_architectures(self.init))
        if set(own) - {"dropout"}:
            raise ValueError(f"--init {self.init} brings its architecture: only dropout can be --set")
        return replace(load_config(find(self.init))[0], **own)

    def encoders(self, data: Data) -> dict[str, Encoder]:
        """The encoders that the model needs for these data: those of `init` if it has them, or else as they are `set`.

        Raises:
            ValueError: a field that is none, or one that the data decide; or data that `init` would see otherwise.
        """
        changes: dict[str, dict[str, Any]] = {}
        for name, value in self.set.items():
            kind, dot, field_name = name.partition(".")
            if dot:
                changes.setdefault(kind, {})[field_name] = value
        made: dict[str, Encoder] = load_encoders(find(self.init)) if self.init else {}
        for kind, how in data.media.items():
            known = {f.name for f in fields(ENCODERS[kind])}
            changed = changes.pop(kind, {})
            if wrong := sorted(set(changed) - (known - set(how))):
                why = "the data decide it" if wrong[0] in how else f"it has {', '.join(sorted(known - set(how)))}"
                raise ValueError(f"--set {kind}.{wrong[0]}: {why}")
            if kind not in made:
                try:
                    made[kind] = config_for(kind, how, **changed)
                except (ValueError, TypeError) as error:  # which names the field alone
                    raise type(error)(f"--set {kind}.…: {error}") from None
            elif changed:
                raise ValueError(f"--init {self.init} brings its encoder of {kind}: leave out --set {kind}.…")
            # another token is another tokenizer, of which more is said elsewhere
            elif odd := [k for k, v in how.items() if k in known - {"token"} and getattr(made[kind], k) != v]:
                had, now = getattr(made[kind], odd[0]), how[odd[0]]
                raise ValueError(f"{self.init} has {kind} {odd[0]} {had}, {data.path} has {now}: pack the data alike")
        if changes:
            raise ValueError(f"--set {next(iter(changes))}.…: {data.path} holds nothing of that kind")
        return made

    def build(self, data: Data, here: Processes = ALONE) -> tuple[Config, LanguageModel]:
        """(config, model) to begin with.

        Raises:
            ValueError: they do not fit the data, the mode or the memory; found before the model is made.
        """
        resumes = self.resume and folders(self.out)
        # A resumed run has its config and its weights: the model that it began from may be there no more.
        # So may the defaults of this version be others than those that it began with.
        config = load_config(self.out)[0] if resumes else self.config(data.meta.vocab_size)
        if self.mode == "carry" and (config.library or config.attends):
            raise ValueError(
                f"mode carry hands on states of retention, a {config.name} attends as well: use another mode"
            )
        if not here.divided:  # what a part of a model takes is not looked at
            check_fits(config, self.batch // here.dp, self.length, here.device or pick_device(self.train.device))
        torch.manual_seed(self.train.seed)  # of the initialisation; each step seeds what comes after
        encoders = load_encoders(self.out) if resumes else self.encoders(data)
        if encoders and config.library:
            raise ValueError(f"a {config.name} reads ids alone, and {data.path} holds {', '.join(encoders)}")
        model = build(config)
        if encoders:
            with_encoders(model, encoders)
        if self.init and not resumes:
            if self.lora and load_adapter(find(self.init)):
                raise ValueError(
                    f"{self.init} is an adapter itself: merge it first (retentive convert {self.init} OUT)"
                )
            if load_quantization(find(self.init)):
                raise ValueError(f"{self.init} is quantised, and such are not trained: take what it was made from")
            given, tokenizer = load(self.init, dtype=torch.float32)  # weights that are trained are float32, as moments
            check_vocabulary(self.init, given, tokenizer, data)
            new = set(encoders) - set(encoders_of(given))  # which it is given now
            if new and self.lora:
                raise ValueError(
                    f"{self.init} has no encoder of {', '.join(sorted(new))}, and --lora would leave a new one as it "
                    "was drawn: train the whole model on such data first"
                )
            model.load_state_dict(given.state_dict(), strict=not new)
        elif self.lora:  # what the checkpoint has is the change alone
            before = load_adapter(self.out)
            if before is None or before.base_sha256 != weights_sha256(find(self.init)):
                raise ValueError(f"{self.init} is not the model, or no longer, that the run at {self.out} changes")
            model.load_state_dict(load(self.init, dtype=torch.float32)[0].state_dict())
        return config, with_adapter(model, self.adapter(model)) if self.lora else model

    def adapter(self, model: LanguageModel) -> Adapter:
        """The change that is trained.

        Raises:
            ValueError: it has no such targets.
        """
        base = self.init if self.init.startswith("hf:") else str(Path(self.init).resolve())
        targets = targets_of(model, self.lora_targets, self.lora)
        return Adapter(base, weights_sha256(find(self.init)), self.lora, self.lora_alpha, targets)

    def hooks(self, data: Data, config: Config) -> Hooks:
        """Evaluation on the held-out text, if there is some, and samples of text, if the model can be decoded."""
        how: dict[str, Any] = {"length": self.length, "carry": self.mode == "carry"}

        def evaluate(model: LanguageModel, tokens: int) -> HeldOut:
            if isinstance(data, Mixture):
                return mixture_loss(model, data, tokens=tokens, **how)
            return held_out_loss(model, data, tokens=tokens, **how)

        def sample(model: LanguageModel) -> str:
            asked = self.train.sample_prompt
            if data.template is None:
                return sample_text(model, data.tokenizer, asked)
            if asked:
                return sample_answer(model, data.template, data.template.first([{"role": "user", "content": asked}]))
            return sample_answer(model, data.template, *data.first_question())

        return Hooks(evaluate if data.holds_out(self.length) else None, sample if config.keeps_state else None)

    def directory(self, data: Data) -> RunDirectory:
        """Where the run is written, with what train.json records of it for `resume`."""
        apart = ("train", "parallel", "resume", "overwrite")
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
        record = {"command": plain(options), "data_sha256": data.fingerprint}
        template = data.template.source if data.template else None
        if template is None and self.init and not (self.resume and folders(self.out)):  # that has its own
            template = template_of(find(self.init))
        return RunDirectory(self.out, data.tokenizer, template, record, self.existing)


def amount(data: Data) -> str:
    """How much text there is to train on, and of a mixture how much of the rows each folder has."""
    tokens = f"{data.meta.splits['train'].tokens / 1e6:.1f} M tokens"
    if not isinstance(data, Mixture):
        return tokens
    return f"{tokens} ({', '.join(f'{share:.1%} {name}' for name, share in data.shares.items())})"


def both_architectures(init: str) -> str:
    """What is said to who gives a model folder and a size."""
    return f"--init {init} brings its architecture: leave out --size and --model"


def check_fits(config: Config, batch: int, length: int, device: torch.device) -> None:
    """Raises ValueError where a step certainly cannot fit into the memory that is free now (it may still not fit)."""
    least, free = cost.least_training_bytes(config, batch * length), machine.free_memory(device)
    if least > free:
        raise ValueError(
            f"{cost.parameters(config) / 1e6:,.1f} M parameters and {batch:,} x {length:,} tokens a batch take "
            f"{least / 1e9:,.1f} GB at the very least, {free / 1e9:,.1f} GB are free on {device}: choose a smaller "
            f"--size, --batch or --length (--accumulate makes one step of several batches)"
        )


def check_vocabulary(init: str, model: LanguageModel, tokenizer: Tokenizer | None, data: Data) -> None:
    """Raises ValueError where the model's embedding is for other tokens than those of the data."""
    if tokenizer and tokenizer.sha256 != data.tokenizer.sha256:
        raise ValueError(
            f"{init} has another tokenizer than {data.path}: pack the text with that one "
            f"(retentive data … --tokenizer {init})"
        )
    if model.config.vocab_size < data.meta.vocab_size:
        raise ValueError(
            f"{init} knows {model.config.vocab_size:,} tokens, {data.path} has {data.meta.vocab_size:,}: "
            f"pack the text with the model's own tokenizer"
        )
