"""`retentive sft`: teach a model to answer, by conversations; the template that they are spelt by goes with it."""

import hashlib
import math
import shutil
import signal
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from retentive.checkpoint.io import find, load_config
from retentive.cli.data import shown
from retentive.cli.progress import say
from retentive.cli.train import CHANGES, typed_options
from retentive.data.chats import chat_files
from retentive.data.loader import Mode
from retentive.data.packed import Packed
from retentive.data.prepare import prepare
from retentive.data.templates import template_of
from retentive.data.tokenizer import load_tokenizer
from retentive.files import file_sha256
from retentive.models import RetNetConfig
from retentive.train import Interrupted, TrainConfig, TrainRun
from retentive.train.checkpoints import folders
from retentive.train.directory import Existing, RunDirectory


@dataclass(frozen=True)
class SftCommand:
    """Fine-tune a model on conversations, whose answers alone are learnt; or train one on them from the beginning.

    The run is one like any other: generate, chat, serve, eval and quantize take it, and train --resume goes on with it.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run directory or model folder to begin with, or hf:owner/name on the hub."""
    data: tuple[str, ...]
    """Files or folders of conversations (.jsonl .json .parquet: messages, ShareGPT's, or prompt and completion), which
    are packed into a folder beside the run (OUT-data-…); or a folder that `retentive data --chats` has packed."""
    out: Path
    """Run directory to make."""
    valid: str | None = None
    """Conversations of their own to hold out, instead of a part of the others."""
    valid_fraction: float = 0.05
    """The part of them that is held out."""
    template: Path | None = None
    """A chat template in place of the model's own; without either, a plain one."""
    epochs: float = 3.0
    """How often all conversations are gone through; --steps says it in steps."""
    mode: Mode | None = None
    """carry: rows read on from row to row, with their states, however long a conversation is; whole: rows of whole
    conversations. By default carry for RetNets, whole for models that attend."""
    lora: int = 0
    """Train a low-rank change of this rank, and save that alone (LoRA); 0 trains the whole model."""
    lora_alpha: float = TrainRun.lora_alpha
    """The change is multiplied by this over its rank."""
    lora_targets: str = TrainRun.lora_targets
    """The matrices that it changes: all, or some, such as q_proj,v_proj."""
    batch: int = 8
    """Rows of a batch."""
    length: int = 512
    """Tokens of a row."""
    resume: bool = False
    """Go on from the run's newest checkpoint, if it has one."""
    overwrite: bool = False
    """Begin anew where there is a run at --out."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: TrainConfig(lr=3e-4, warmup=20, eval_every=100, save_every=100, sample_every=100)
    )


def main(argv: list[str]) -> None:
    """`retentive sft ARGV`."""
    command = tyro.cli(SftCommand, prog="retentive sft", args=argv, registry=CHANGES)
    # what the run begins with is always said; epochs are another way to say steps
    typed = typed_options(argv) | {"init"}
    typed |= {"steps"} if "epochs" in typed else set()
    if not 0 < command.epochs < math.inf:
        raise ValueError(f"--epochs must be above 0, got {command.epochs}")
    run = TrainRun(
        Path(),
        command.out,
        init=command.model,
        lora=command.lora,
        lora_alpha=command.lora_alpha,
        lora_targets=command.lora_targets,
        mode=command.mode or usual_mode(command.model),
        batch=command.batch,
        length=command.length,
        resume=command.resume,
        overwrite=command.overwrite,
        train=command.train,
    )
    existing: Existing = "resume" if command.resume else "overwrite" if command.overwrite else "refuse"
    RunDirectory(command.out, existing=existing).check()  # as all that can be refused before anything is packed
    folder = where(command, typed)
    made = pack(command, folder)
    try:
        data = Packed(folder)
        if not data.meta.chats:
            raise ValueError(f"{folder} holds texts, in which nothing is an answer: retentive train reads it")
        run = replace(run, data=folder)
        if "epochs" in typed or "steps" not in typed:
            steps = math.ceil(command.epochs * run.batches(data).steps_per_epoch / command.train.accumulate)
            run = replace(run, train=replace(run.train, steps=max(1, steps)))
        run.run(overrides=typed)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        if stop.number == signal.SIGINT:
            sys.exit(130)
    except Exception:
        if made and not folders(command.out):  # nothing is trained on it
            shutil.rmtree(folder)
        raise


def usual_mode(model: str) -> Mode:
    """How conversations are put into rows where nobody says."""
    return "carry" if type(load_config(find(model))[0]) is RetNetConfig else "whole"


def where(command: SftCommand, typed: set[str]) -> Path:
    """The folder of the packed conversations: the one given, or one beside the run, named by what it is made from.

    Raises:
        ValueError: options of packing beside a folder that is packed.
    """
    if len(command.data) == 1 and (Path(command.data[0]) / "meta.json").is_file():
        if given := sorted(typed & {"valid", "valid_fraction", "template"}):
            raise ValueError(f"{command.data[0]} is packed: --{given[0].replace('_', '-')} is given to retentive data")
        return Path(command.data[0])
    base = find(command.model)
    template = command.template.read_bytes() if command.template else (template_of(base) or "").encode()
    sources = (*command.data, *([command.valid] if command.valid else []))
    files = [(name, file_sha256(path)) for source in sources for name, path in chat_files(source).items()]
    made_from = repr((load_tokenizer(base).sha256, template, command.valid, command.valid_fraction, files))
    digest = hashlib.sha256(made_from.encode()).hexdigest()
    return command.out.with_name(f"{command.out.name}-data-{digest[:8]}")


def pack(command: SftCommand, folder: Path) -> bool:
    """Packs the conversations into the folder; whether that had to be done.

    Raises:
        ValueError, OSError: as `prepare`; nothing is written then.
    """
    if (folder / "meta.json").is_file():
        return False
    with shown(sys.stderr) as progress:
        prepare(
            command.data, folder, chats=True, tokenizer=str(find(command.model)), template=command.template,
            valid=command.valid, valid_fraction=command.valid_fraction, progress=progress, say=say,
        )  # fmt: skip
    return True
