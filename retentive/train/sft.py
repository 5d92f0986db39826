"""A run that teaches a model to answer by conversations: they are packed beside it, and then trained on as any data.

SftRun("runs/mine", ("chats.jsonl",), Path("runs/talks")).run()
"""

import hashlib
import math
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from retentive.checkpoint.io import find, load_config, load_encoders
from retentive.data.chats import chat_files, chats
from retentive.data.loader import Mode
from retentive.data.media import Media
from retentive.data.packed import Packed
from retentive.data.prepare import Progress, prepare
from retentive.data.templates import template_of
from retentive.data.tokenizer import load_tokenizer
from retentive.files import file_sha256
from retentive.train.checkpoints import folders
from retentive.train.config import TrainConfig
from retentive.train.directory import RunDirectory
from retentive.train.processes import started_by_torchrun
from retentive.train.run import TrainRun

Shown = Callable[[], AbstractContextManager[Progress | None]]


@dataclass(frozen=True)
class SftRun:
    """Fine-tune a model on conversations, whose answers alone are learnt; or train one on them from the beginning.

    The run is one like any other: generate, chat, serve, eval and quantize take it, and train --resume goes on with it.
    """

    init: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
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
    conversations. By default carry for RetNets, whole for models that attend, and where there are pictures or sound."""
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

    def run(
        self,
        *,
        overrides: Collection[str] | None = None,
        shown: Shown = nullcontext,
        say: Callable[[str], None] = warnings.warn,
        quiet: bool = False,
    ) -> Path:
        """The run directory, once the model is trained.

        Args:
            overrides: the names of the fields that the user has chosen, as of `TrainRun.run`; all if not given. The
                epochs count unless "steps" is among them, and "epochs" is not.
            shown: a context in which packing is shown, as by a bar; it gives what is told how far that is.
            say: as of `prepare`.
            quiet: as of `TrainRun.run`.

        Raises:
            ValueError, OSError: as `prepare` and `TrainRun.run`; nothing is left of conversations packed for nothing.
        """
        if started_by_torchrun():
            raise ValueError(
                "sft is one process: pack with retentive data --chats, then retentive train --init … --nproc"
            )
        if not 0 < self.epochs < math.inf:
            raise ValueError(f"--epochs must be above 0, got {self.epochs}")
        chosen = (
            {f.name for kind in (SftRun, TrainConfig) for f in fields(kind)} if overrides is None else set(overrides)
        )
        by_epochs = overrides is None or "epochs" in chosen or "steps" not in chosen
        names = {f.name for f in fields(TrainRun)} & {f.name for f in fields(self)} - {"data"}
        mode = self.mode or usual_mode(self.init)
        run = TrainRun(Path(), **{name: getattr(self, name) for name in names} | {"mode": mode})
        # this, as all that can be refused before anything is packed
        RunDirectory(run.out, existing=run.existing).check()
        before = folders(self.out)
        folder = self.folder(chosen if overrides is not None else ())
        made = self.pack(folder, shown, say)
        try:
            data = Packed(folder)
            if not data.meta.chats:
                raise ValueError(f"{folder} holds texts, in which nothing is an answer: retentive train reads it")
            run = replace(run, data=folder, mode="whole" if data.media and self.mode is None else run.mode)
            if by_epochs:
                steps = math.ceil(self.epochs * run.batches(data).steps_per_epoch / self.train.accumulate)
                run = replace(run, train=replace(run.train, steps=max(1, steps)))
            # what it begins with is always said; epochs are another way to say steps
            chosen |= {"init"} | ({"steps"} if "epochs" in chosen else set())
            return run.run(overrides=chosen, quiet=quiet)
        except Exception:
            if made and folders(self.out) == before:  # nothing is trained on it
                shutil.rmtree(folder)
            raise

    def folder(self, chosen: Collection[str]) -> Path:
        """That of the packed conversations: the one given, or one beside the run, named by what it is made from.

        Raises:
            ValueError: options of packing were chosen beside a folder that is packed.
        """
        if len(self.data) == 1 and (Path(self.data[0]) / "meta.json").is_file():
            if given := sorted({"valid", "valid_fraction", "template"} & set(chosen)):
                raise ValueError(f"{self.data[0]} is packed: --{given[0].replace('_', '-')} is given to retentive data")
            return Path(self.data[0])
        base = find(self.init)
        template = self.template.read_bytes() if self.template else (template_of(base) or "").encode()
        sources = (*self.data, *([self.valid] if self.valid else []))
        files = [(name, file_sha256(path)) for source in sources for name, path in chat_files(source).items()]
        made_from = repr((load_tokenizer(base).sha256, template, self.valid, self.valid_fraction, files))
        if encoders := load_encoders(base):
            made_from += repr((encoders, [each for source in sources for each in _shown(source)]))
        digest = hashlib.sha256(made_from.encode()).hexdigest()
        return self.out.with_name(f"{self.out.name}-data-{digest[:8]}")

    def pack(self, folder: Path, shown: Shown, say: Callable[[str], None]) -> bool:
        """Packs the conversations into the folder; whether that had to be done."""
        if (folder / "meta.json").is_file():
            return False
        base = find(self.init)
        options: dict[str, Any] = {"tokenizer": str(base), "template": self.template, "say": say}
        options |= {"valid": self.valid, "valid_fraction": self.valid_fraction}
        with shown() as progress:
            if load_encoders(base):  # it may be shown pictures and sound
                from retentive import multimodal  # an extra

                media = multimodal.fields_of(base)
                multimodal.prepare(self.data, folder, **media, progress=progress, **options)
            else:
                prepare(self.data, folder, chats=True, progress=progress, **options)
        return True


def _shown(source: str | Path) -> list[tuple[str, str]]:
    """(path, digest) of each picture and sound that conversations name; packing says what is wrong with them."""
    found = []

    def look(kind: str, name: str, *, folder: Path) -> Media:
        if (path := folder / name).is_file():
            found.append((name, file_sha256(path)))
        return Media(kind, np.empty((0, 0)))

    deque(chats(source, media=look), maxlen=0)
    return found


def usual_mode(model: str) -> Mode:
    """How conversations are put into rows where nobody says."""
    config, _ = load_config(find(model))
    return "whole" if config.library or config.attends else "carry"
