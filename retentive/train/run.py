"""A training run as a value: which data, which model, which options, which directory. `TrainRun(…).run()` does it.

The command line, `compare`, the demo and the recipes all make one of these; `retentive.train` is the short form.
"""

import difflib
import json
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from retentive import machine
from retentive.checkpoint.io import find, load, load_config
from retentive.data.loader import Batches, Mode
from retentive.data.packed import Packed
from retentive.data.tokenizer import Tokenizer
from retentive.evals.heldout import HeldOut, held_out_loss
from retentive.infer import SamplingParams, write_on
from retentive.machine import pick_device
from retentive.models import MODELS, Config, Model, PeerConfig, RetNetConfig, build, config_of, cost
from retentive.train.checkpoints import folders
from retentive.train.config import TrainConfig
from retentive.train.directory import RunDirectory, read_options
from retentive.train.loop import Hooks, pick_precision, take_step, train
from retentive.train.objective import language_modelling
from retentive.train.optim import adamw

FREE = {"device", "eval_every", "keep", "save_every", "sample_every", "sample_prompt", "tensorboard", "wandb"}
"""What a run that goes on may change at any time: none of these alters what is computed."""


@dataclass(frozen=True)
class TrainRun:
    """Train a RetNet (or its Transformer twin) on data that `retentive data` has packed."""

    data: Path
    """Folder of packed tokens."""
    out: Path
    """Run directory to make."""
    size: str = "5m"
    """1m, 2m, 5m, 10m, 25m, 60m, 130m, 350m (parameters of the blocks), or a published one (retentive info --sizes)."""
    model: Literal["retnet", "transformer", "hybrid", "llama", "mamba", "mamba2", "rwkv"] = "retnet"
    """Or, as wide and with as many parameters: its Transformer twin, a hybrid of both, or a peer (extra `peers`)."""
    set: Mapping[str, Any] = field(default_factory=dict)
    """Changes to the RetNet's config, such as decay=paper heads=2 dropout=0.1."""
    init: str = ""
    """Model folder to train on from, a run or a converted model: its weights and architecture in place of a size's."""
    mode: Mode = "reset"
    """reset: no state passes a document's end. packed: documents run into each other. carry: each row reads on."""
    batch: int = 8
    """Rows of a batch."""
    length: int = 512
    """Tokens of a row."""
    resume: bool = False
    """Go on from the run's newest checkpoint, if it has one, with its own options; other --steps make it longer."""
    overwrite: bool = False
    """Begin anew where there is a run at --out: its checkpoints and its log are deleted."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)

    @classmethod
    def of(cls, data: str | Path, out: str | Path, **options: Any) -> "TrainRun":
        """A run from keywords: fields of TrainRun and of TrainConfig in one row.

        Raises:
            TypeError: one that neither has.
        """
        inner = {f.name for f in fields(TrainConfig)}
        known = {f.name for f in fields(cls)} - {"data", "out", "train"} | inner
        for name in set(options) - known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(sorted(known))}"
            raise TypeError(f"a training run has no option {name!r}: {hint}")
        return with_options(cls(Path(data), Path(out)), options)

    def __post_init__(self):
        object.__setattr__(self, "data", Path(self.data))
        object.__setattr__(self, "out", Path(self.out))
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other: go on with the run, or begin anew")

    def run(self, *, overrides: Collection[str] | None = None, quiet: bool = False) -> Path:
        """Train, and return the run directory.

        Args:
            overrides: where a run goes on (`resume`), the names of the fields that were chosen and not left at their
                defaults: they must be as in the run, but for `steps` and for what alters nothing that is computed.
                If not given, all fields count as chosen, and `steps` must be as in the run as well.
            quiet: nothing on stderr.

        Raises:
            ValueError: data, model or options that do not go together; what cannot fit into memory.
            FileExistsError, BlockingIOError, FloatingPointError, Interrupted, OSError: as `loop.train`.
        """
        data = Packed(self.data)
        was = read_options(self.out) if self.resume else {}
        run = going_on(self, was, data.fingerprint, overrides) if was else self
        batches, directory = run.batches(data), run.directory(data)
        directory.check()
        config, model = run.build(data)
        what = run.init or f"{run.model} {run.size}"
        title = (
            f"{what}: {cost.parameters(config) / 1e6:.1f} M parameters, "
            f"{data.meta.splits['train'].tokens / 1e6:.1f} M tokens, {run.batch} x {run.length} a batch, "
            f"{run.train.steps} steps on {pick_device(run.train.device)}"
        )
        hooks = replace(run.hooks(data, config), title=title, quiet=quiet)
        return train(model, batches, language_modelling, run.train, directory, hooks)

    def seconds_per_step(self) -> float:
        """Seconds that a step of this run takes on this machine, the median of three; nothing is written."""
        data = Packed(self.data)
        config = replace(self.train, precision=pick_precision(self.train.precision, pick_device(self.train.device)))
        batches, (_, model) = self.batches(data), self.build(data)
        model.to(pick_device(config.device)).train()
        optimizer, carried, times = adamw(model, config), None, []
        for step in range(4):  # the first one allocates
            began = time.perf_counter()
            _, carried = take_step(model, batches, language_modelling, config, optimizer, step, carried)
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])

    def batches(self, data: Packed) -> Batches:
        """What is trained on, in order."""
        return data.batches(mode=self.mode, batch=self.batch, length=self.length, seed=self.train.seed)

    def config(self, vocab_size: int) -> Config:
        """The config of the model, for this vocabulary; that of `init` if there is one."""
        if not self.init:
            return config_of(self.model, self.size, vocab_size=vocab_size, **self.set)
        if (self.size, self.model) != (TrainRun.size, TrainRun.model):
            raise ValueError(f"--init {self.init} brings its architecture: leave out --size and --model")
        if set(self.set) - {"dropout"}:
            raise ValueError(f"--init {self.init} brings its architecture: only dropout can be --set")
        return replace(load_config(find(self.init))[0], **self.set)

    def build(self, data: Packed) -> tuple[Config, Model]:
        """The model to begin with, and its config.

        Raises:
            ValueError: it does not go with the data or the mode, or cannot fit into memory; told before it is made.
        """
        resumes = self.resume and folders(self.out)
        config = load_config(self.out)[0] if resumes and self.init else self.config(data.meta.vocab_size)
        if self.mode == "carry" and type(config) is not RetNetConfig:
            kind = MODELS[type(config)].__name__
            raise ValueError(f"mode carry hands on a state of constant size, which a {kind} has not: use another mode")
        check_fits(config, self.batch, self.length, pick_device(self.train.device))
        torch.manual_seed(self.train.seed)
        model = build(config)
        if self.init and not resumes:
            given, tokenizer = load(self.init, dtype=torch.float32)
            check_vocabulary(self.init, given, tokenizer, data)
            model.load_state_dict(given.state_dict())
        return config, model

    def hooks(self, data: Packed, config: Config) -> Hooks:
        """Evaluation on the held-out text, if there is some, and samples of what the model writes, if it can."""
        how: dict[str, Any] = {"length": self.length, "carry": self.mode == "carry"}

        def evaluate(model: Model, tokens: int) -> HeldOut:
            return held_out_loss(model, data, tokens=tokens, **how)

        def sample(model: Model) -> str:
            return sample_text(model, data.tokenizer, self.train.sample_prompt)

        has_valid = data.meta.splits["valid"].tokens > self.length
        return Hooks(evaluate if has_valid else None, None if isinstance(config, PeerConfig) else sample)

    def directory(self, data: Packed) -> RunDirectory:
        """Where it goes, with what is kept there for the record."""
        apart = ("train", "resume", "overwrite")
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
        record = {"command": plain(options), "data_sha256": data.fingerprint}
        existing: Any = "resume" if self.resume else "overwrite" if self.overwrite else "refuse"
        return RunDirectory(self.out, data.tokenizer, record, existing)


def sample_text(model: Model, tokenizer: Tokenizer, prompt: str, *, tokens: int = 80) -> str:
    """What the model writes after `prompt` now, always with the same seed."""
    training = model.training
    params = SamplingParams(temperature=0.8, top_p=0.95, seed=0)
    text = "".join(write_on(model.eval(), tokenizer, prompt, params, max_tokens=tokens))
    model.train(training)
    return text


def check_fits(config: Config, batch: int, length: int, device: torch.device) -> None:
    """Raises ValueError where a step cannot fit into the memory that is free now: what is sure, not what is likely."""
    least, free = cost.least_training_bytes(config, batch * length), machine.free_memory(device)
    if least > free:
        raise ValueError(
            f"{cost.parameters(config) / 1e6:,.1f} M parameters and {batch:,} x {length:,} tokens a batch take "
            f"{least / 1e9:,.1f} GB at the very least, {free / 1e9:,.1f} GB are free on {device}: choose a smaller "
            f"--size, --batch or --length (--accumulate makes one step of several batches)"
        )


def check_vocabulary(init: str, model: Model, tokenizer: Tokenizer | None, data: Packed) -> None:
    """Raises ValueError where a model's weights are for other tokens than those of the data."""
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


def going_on(run: TrainRun, was: Mapping[str, Any], fingerprint: str, overrides: Collection[str] | None) -> TrainRun:
    """The run at `run.out` as it goes on: its own options (`was`), and of the new ones what may change.

    The folder of the data may have been moved, but must be the same. A run without a checkpoint has nothing to keep to.
    """
    chosen = set(options_of(run)) if overrides is None else set(overrides) & set(options_of(run))
    free = FREE if overrides is None else FREE | {"steps"}
    kept = folders(run.out)
    try:
        own = was["command"] | {"data": run.data, "out": run.out, "set": changes_of(was["command"]["set"])}
        before = TrainRun(**own, train=TrainConfig(**was["train"]), resume=True)
        check_types(before)
        same_data = was["data_sha256"] == fingerprint
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run.out / 'train.json'} does not hold a run's options ({error}): it cannot go on") from None
    if not kept:
        free = chosen
    elif not same_data:
        raise ValueError(f"{run.data} holds other data than the run at {run.out} was trained on: name those")
    new, old = options_of(run), options_of(before)
    for name in sorted(chosen - free):
        same_precision = name == "precision" and new[name] == "auto"  # which became what the run has
        if plain(new[name]) != plain(old[name]) and not same_precision:
            flag = name.replace("_", "-")
            raise ValueError(
                f"--{flag} {told(new[name])} contradicts the run at {run.out}, which has {told(old[name])}: "
                f"leave it out"
            )
    done = int(kept[-1].name.removeprefix("step-")) if kept else 0
    if "steps" in chosen & free and run.train.steps < done:
        raise ValueError(f"--steps {run.train.steps} is less than the {done} that the run at {run.out} has done")
    return with_options(before, {name: new[name] for name in chosen & free})


def changes_of(stored: Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    """The config's changes as train.json has them; runs from before 26 November 2026 have FIELD=VALUE strings."""
    if isinstance(stored, Mapping):
        return dict(stored)
    pairs = [str.partition(item, "=")[::2] for item in stored]
    numbers = {name: text for name, text in pairs if text[:1] in "[-0123456789" or text in ("true", "false")}
    return dict(pairs) | {name: json.loads(text) for name, text in numbers.items()}


def check_types(run: TrainRun) -> None:
    """Raises TypeError for an option whose value is not of its default's type, as a damaged train.json may have it."""
    usual = options_of(TrainRun(run.data, run.out))
    for name, value in options_of(run).items():
        whole = type(usual[name]) is float and type(value) is int
        if type(value) is not type(usual[name]) and not whole:
            raise TypeError(f"{name} is {value!r}")


def options_of(run: TrainRun) -> dict[str, Any]:
    """All fields in one row, but for where the data and the run are and what is done with a run that is there."""
    apart = ("data", "out", "resume", "overwrite", "train")
    own = {f.name: getattr(run, f.name) for f in fields(run) if f.name not in apart}
    return own | {f.name: getattr(run.train, f.name) for f in fields(run.train)}


def with_options(run: TrainRun, options: Mapping[str, Any]) -> TrainRun:
    """The run with fields changed, its own and TrainConfig's in one row."""
    inner = {f.name for f in fields(TrainConfig)}
    train = replace(run.train, **{name: value for name, value in options.items() if name in inner})
    return replace(run, **{name: value for name, value in options.items() if name not in inner}, train=train)


def plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value, default=str))


def told(value: Any) -> str:
    """A value as it is typed on the command line."""
    return " ".join(f"{name}={x}" for name, x in value.items()) or "none" if isinstance(value, Mapping) else str(value)
