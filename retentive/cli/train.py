"""`retentive train`: a model from packed data, in a run directory that is enough to go on from."""

import hashlib
import json
import runpy
import sys
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import tyro

from retentive.data.loader import Batches, check_tokenizer
from retentive.data.pack import load_meta
from retentive.data.tokenizer import Tokenizer, load_tokenizer
from retentive.infer import SamplingParams, write_on
from retentive.machine import pick_device
from retentive.models import Config, HybridConfig, Model, RetNetConfig, build, cost, peer, preset, twin
from retentive.models.peers import KINDS as PEERS
from retentive.train import TrainConfig, train
from retentive.train.evaluate import evaluate
from retentive.train.loop import Interrupted


@dataclass(frozen=True)
class TrainCommand:
    """Train a RetNet (or its Transformer twin) on data that `retentive data` has packed."""

    data: Path
    """Folder of packed tokens."""
    out: Path
    """Run directory to make."""
    size: str = "5m"
    """Size of the model, the one dial: 1m, 2m, 5m, 10m, 25m, 60m, 130m, 350m (parameters of the blocks), or a published
    one (retentive info --sizes)."""
    model: Literal["retnet", "transformer", "hybrid", "llama", "mamba", "mamba2", "rwkv"] = "retnet"
    """A RetNet; the Transformer of the same width, depth and parameters; a hybrid of both (--set attention_every=4); or
    a model of the transformers library (extra `peers`), as wide and with about as many parameters, to compare with."""
    set: tuple[str, ...] = ()
    """Changes to the RetNet's config, such as decay=paper heads=2 dropout=0.1."""
    mode: Literal["reset", "packed", "carry"] = "reset"
    """reset: no state passes a document's end. packed: documents run into each other. carry: every row reads one
    long stream, its state handed from step to step."""
    batch: int = 8
    """Rows of a batch."""
    length: int = 512
    """Tokens of a row."""
    resume: bool = False
    """Go on from the newest checkpoint of the run at --out, if there is one; its own options hold."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)


Command = TypeVar("Command")

# what a run that goes on may change: none of these alters what is computed
ALL = {f.name for f in (*fields(TrainCommand), *fields(TrainConfig))}
FREE = {"device", "eval_every", "keep", "save_every", "sample_every", "sample_prompt", "tensorboard", "wandb"}


def main(argv: list[str]) -> None:
    default, argv = read_recipe(argv, TrainCommand)
    command = tyro.cli(
        TrainCommand,
        prog="retentive train",
        args=argv,
        description=HELP,
        default=tyro.MISSING_NONPROP if default is None else default,
    )
    typed = {a.split("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_") for a in argv if a[:2] == "--"}
    if default is not None:
        typed |= ALL
    try:
        run(command, typed=typed)
    except Interrupted as stop:
        print(stop, file=sys.stderr)


HELP = """Train a RetNet (or its Transformer twin) on data that `retentive data` has packed.

--recipe FILE.py takes the options that the file's function recipe() returns; further flags change them."""


def read_recipe(argv: list[str], kind: type[Command]) -> tuple[Command | None, list[str]]:
    """The command of --recipe FILE.py, and the arguments without it."""
    argv = [part for a in argv for part in (a.split("=", 1) if a.startswith("--recipe=") else [a])]
    if "--recipe" not in argv:
        return None, argv
    at = argv.index("--recipe")
    if at + 1 == len(argv):
        raise ValueError(f"--recipe needs a file: a Python file whose function recipe() returns a {kind.__name__}")
    path = Path(argv[at + 1])
    if not path.is_file():
        raise FileNotFoundError(f"no recipe at {path}")
    recipe = runpy.run_path(str(path)).get("recipe")
    command = recipe() if callable(recipe) else None
    if not isinstance(command, kind):
        raise ValueError(f"{path} is no recipe: expected a function recipe() that returns a {kind.__name__}")
    return command, argv[:at] + argv[at + 2 :]


def run(command: TrainCommand, *, typed: Collection[str] = (), quiet: bool = False) -> Path:
    """Carry the command out and return the run directory; `typed` are the options that were given and not defaults."""
    meta = load_meta(command.data)
    fingerprint = hashlib.sha256((command.data / "meta.json").read_bytes()).hexdigest()
    command = stored(command, fingerprint, typed) if command.resume else command
    tokenizer = load_tokenizer(command.data)
    check_tokenizer(meta, tokenizer)
    batches = Batches(
        command.data, mode=command.mode, batch=command.batch, length=command.length, seed=command.train.seed
    )
    if command.mode == "carry" and command.model != "retnet":
        raise ValueError(
            f"mode carry hands on a state of constant size, which a {command.model} has not: use another mode"
        )
    torch.manual_seed(command.train.seed)
    config = model_config(command, meta.vocab_size)
    model = build(config)
    title = (
        f"{command.model} {command.size}: {cost.parameters(config) / 1e6:.1f} M parameters, "
        f"{meta.splits['train'].tokens / 1e6:.1f} M tokens, {command.batch} x {command.length} a batch, "
        f"{command.train.steps} steps on {pick_device(command.train.device)}"
    )

    def held_out(model, tokens):
        carry = command.mode == "carry"
        return evaluate(model, command.data, tokenizer, length=command.length, tokens=tokens, carry=carry)

    prompt, has_valid = command.train.sample_prompt, meta.splits["valid"].tokens > command.length
    record = asdict(replace(command, train=TrainConfig()))
    del record["train"], record["resume"]
    return train(
        model,
        batches,
        command.train,
        out=command.out,
        tokenizer=tokenizer,
        evaluate=held_out if has_valid else None,
        sample=None if command.model in PEERS else lambda model: sample_text(model, tokenizer, prompt),
        title=title,
        record={"command": json.loads(json.dumps(record, default=str)), "data_sha256": fingerprint},
        resume=command.resume,
        quiet=quiet,
    )


def sample_text(model: Model, tokenizer: Tokenizer, prompt: str, *, tokens: int = 80) -> str:
    """What the model writes after `prompt` now, always with the same seed."""
    training = model.training
    params = SamplingParams(temperature=0.8, top_p=0.95, seed=0)
    text = "".join(write_on(model.eval(), tokenizer, prompt, params, max_tokens=tokens))
    model.train(training)
    return text


def model_config(command: TrainCommand, vocab_size: int) -> Config:
    """The config of --size with the changes of --set, for this vocabulary."""
    kind = HybridConfig if command.model == "hybrid" else RetNetConfig
    defaults = {f.name: f.default for f in fields(kind)}
    changes = {}
    for item in command.set:
        name, _, text = item.partition("=")
        if name not in defaults or name == "vocab_size":
            raise ValueError(f"--set {item}: expected FIELD=VALUE, FIELD one of {', '.join(defaults)}")
        changes[name] = read_value(item, text, type(defaults[name]))
    config = preset(command.size, vocab_size=vocab_size, kind=kind, **changes)
    if command.model in PEERS:
        return peer(config, command.model)
    return twin(config) if command.model == "transformer" else config


def read_value(item: str, text: str, kind: type) -> Any:
    """The value of --set FIELD=text for a field whose default is of this kind; a list of numbers may be a decay."""
    if kind is str and not text.startswith("["):
        return text
    try:
        value = json.loads(text)
    except ValueError:
        raise ValueError(f"--set {item}: {text!r} is no number, true or false") from None
    fits = {str: type(value) is list, bool: type(value) is bool, int: type(value) is int}
    if not fits.get(kind, type(value) in (int, float)):
        wanted = {str: "numbers", bool: "true or false", int: "a whole number"}.get(kind, "a number")
        raise ValueError(f"--set {item}: expected {wanted}, got {text}")
    return tuple(value) if kind is str else value


def stored(command: TrainCommand, data: str, typed: Collection[str]) -> TrainCommand:
    """The run's own options where it exists; what was `typed` may repeat them, but not contradict them.

    `data` is the hash of the data's description: the folder may have been moved, but must be the same.
    """
    file = command.out / "train.json"
    if not file.exists():
        return command
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        was_data, options = raw["data_sha256"], raw["command"]
        options |= {"data": command.data, "out": command.out, "set": tuple(options["set"])}
        was = TrainCommand(**options, train=TrainConfig(**raw["train"]), resume=True)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} does not hold a run's options ({error}): the run cannot go on") from None
    if was_data != data:
        raise ValueError(f"{command.data} holds other data than the run at {command.out} was trained on: name those")
    free = {name: getattr(command.train, name) for name in FREE if name in typed}
    for given, before in ((command, was), (command.train, was.train)):
        for name in {f.name for f in fields(given)} & set(typed) - FREE - {"data", "out", "resume", "train"}:
            new, old = getattr(given, name), getattr(before, name)
            if new != old:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} {new} contradicts the run at {command.out}, which has {old}: leave it out")
    return replace(was, train=replace(was.train, **free))
