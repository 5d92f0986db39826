"""Supervised fine-tuning (SFT): packs conversations into a folder beside the run, then trains on it.

SftRun("chats.jsonl", "runs/talks", init="runs/mine").run()
"""

import hashlib
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from retentive.checkpoint import ModelFolder
from retentive.data.archives import split
from retentive.data.chats import chat_files, chats
from retentive.data.loader import Mode
from retentive.data.media import Media
from retentive.data.prepare import prepare
from retentive.data.tokenizer import load_tokenizer
from retentive.files import file_sha256
from retentive.train.checkpoints import folders
from retentive.train.config import TrainConfig
from retentive.train.hooks import Callback
from retentive.train.objective import Objective
from retentive.train.parallel.rendezvous import several
from retentive.train.run import TrainRun
from retentive.train.texts import Shown


@dataclass(frozen=True)
class SftRun(TrainRun):
    """Fine-tune a model on conversations, with the loss on the answers only.

    The result is a run like any other: generate, chat, serve, eval and quantize take it.
    """

    data: Path | tuple[Path, ...]
    """Files or folders of conversations (.jsonl .json .parquet: messages, ShareGPT's, Alpaca's, or prompt and
    completion). They are packed into a folder beside the run (OUT-data-…). Or a folder packed by `retentive data
    --chats`."""
    init: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")] = tyro.MISSING
    """Initial model: run directory, model folder, or hf:owner/name on the hub. A quantised one, as the
    shipped ones, needs --lora."""
    mode: Mode | Literal["auto"] = "auto"
    """carry: each row continues the one before, with its state, so conversations may be of any length. whole: rows of
    whole conversations. auto: whole for models with attention and for data with pictures or sound, else carry."""
    epochs: float = 3.0
    """Passes over all conversations. A number of steps (`steps`) takes their place."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: TrainConfig(lr=3e-4, warmup=20, eval_every=100, save_every=100, sample_every=100)
    )
    valid: str | None = None
    """File or folder of held-out conversations, instead of a fraction of the conversations."""
    valid_fraction: float = 0.05
    """Fraction of the conversations to hold out."""
    template: Path | None = None
    """Chat template file. Default: the model's own template, or a plain one."""

    def __post_init__(self):
        if self.init is tyro.MISSING or not self.init:
            raise ValueError("conversations are learnt by a model: name the one to begin with (`init`)")
        if not self.epochs > 0:
            raise ValueError(f"`epochs` must be above 0, got {self.epochs}")
        super().__post_init__()

    def run(
        self,
        *,
        overrides: Collection[str] | None = None,
        quiet: bool = False,
        shown: Shown = nullcontext,
        say: Callable[[str], None] = warnings.warn,
        objective: Objective | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> Path:
        """Pack the conversations, train the model and return the run directory.

        Args:
            overrides: as in `TrainRun.run`. Epochs set the number of steps unless `overrides` has "steps" without
                "epochs".
            quiet: as in `TrainRun.run`.
            shown: makes a context that shows the progress of packing, such as a bar; it gives the progress callback.
            say: as in `prepare`.
            objective, callbacks: as in `TrainRun.run`.

        Raises:
            ValueError, OSError: as `prepare` and `TrainRun.run`; conversations packed for a run that did not train
                are deleted.
        """
        if several():
            raise ValueError(
                "sft is one process: pack the conversations first (retentive data), then train with `init`"
            )
        self.check()
        before, folder = folders(self.out), self.folder(overrides or ())
        made = self.pack(folder, shown, say)
        try:
            own = {f.name: getattr(self, f.name) for f in fields(TrainRun)}
            run = TrainRun(**{**own, "data": folder})
            if not run.opened().meta.chats:
                raise ValueError(f"{folder} holds texts, in which nothing is an answer: retentive train reads it")
            # `init` always counts as chosen by the user
            typed = None if overrides is None else {*overrides, "init"}
            return run.run(overrides=typed, quiet=quiet, objective=objective, callbacks=callbacks)
        except Exception:
            if made and folders(self.out) == before:  # no run has trained on it
                shutil.rmtree(folder)
            raise

    @property
    def sources(self) -> tuple[Path, ...]:
        """Files and folders of conversations, or a packed folder."""
        return self.data if isinstance(self.data, tuple) else (self.data,)

    def folder(self, overrides: Collection[str] = ()) -> Path:
        """Folder of the packed conversations: the given one, or one beside the run, named by a hash of its sources.

        Raises:
            ValueError: packing options were given together with a packed folder.
        """
        if len(self.sources) == 1 and (self.sources[0] / "meta.json").is_file():
            if given := sorted({"valid", "valid_fraction", "template"} & set(overrides)):
                raise ValueError(f"{self.sources[0]} is packed: `{given[0]}` is given to retentive data")
            return self.sources[0]
        base = ModelFolder.open(self.init)
        if base.gguf:
            raise ValueError(f"{self.init} is a GGUF file: make a folder of it first (`retentive convert`)")
        template = self.template.read_bytes() if self.template else (base.template_source or "").encode()
        sources: list[str | Path] = [*self.sources, *([self.valid] if self.valid else [])]
        files = [(name, file_sha256(path)) for source in sources for name, path in chat_files(source).items()]
        made_from = repr((load_tokenizer(base.path).sha256, template, self.valid, self.valid_fraction, files))
        if encoders := base.encoders:
            made_from += repr((encoders, [each for source in sources for each in media_files(source)]))
        digest = hashlib.sha256(made_from.encode()).hexdigest()
        return self.out.with_name(f"{self.out.name}-data-{digest[:8]}")

    def pack(self, folder: Path, shown: Shown, say: Callable[[str], None]) -> bool:
        """Pack the conversations into the folder; returns False if it already holds them."""
        if (folder / "meta.json").is_file():
            return False
        base = ModelFolder.open(self.init)
        options: dict[str, Any] = {"tokenizer": str(base.path), "template": self.template, "say": say, "advise": False}
        options |= {"valid": self.valid, "valid_fraction": self.valid_fraction}
        with shown() as progress:
            if base.encoders:  # conversations may have pictures and sound
                from retentive import multimodal  # an extra

                media = multimodal.fields_of(base)
                multimodal.prepare(self.sources, folder, **media, progress=progress, **options)
            else:
                prepare(self.sources, folder, chats=True, progress=progress, **options)
        return True


def media_files(source: str | Path) -> list[tuple[str, str]]:
    """(name, digest of its file) of each existing picture and sound that the conversations name."""
    found = []
    digest = cache(file_sha256)  # an archive or array is named for each of its members or rows

    def look(kind: str, name: str, *, folder: Path) -> Media:
        if (path := split(folder / name)[0]).is_file():
            found.append((name, digest(path)))
        return Media(kind, np.empty((0, 0)))

    deque(chats(source, media=look), maxlen=0)
    return found
