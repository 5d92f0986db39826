"""The run directory: its files, its lock, and the rules for a directory that already holds a run.

RUN/config.json tokenizer.json model.safetensors    the model folder that `retentive.load` reads
RUN/train.json                                      the options, for the record and to resume the run
RUN/metrics.jsonl                                   a line per step, evaluation and sample
RUN/checkpoints/                                    checkpoints to resume from, see `checkpoints`
RUN/.lock                                           locked by the process that trains; the file itself stays
"""

import contextlib
import json
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from retentive.checkpoint.folder import UNTRAINED
from retentive.data.tokenizer import Tokenizer
from retentive.files import make_folder, write_json
from retentive.options import option
from retentive.train.checkpoints import folders
from retentive.train.config import TrainConfig
from retentive.train.parallel import Cluster

Existing = Literal["refuse", "resume", "overwrite"]
DELETED = ("checkpoints", "metrics.jsonl", "tensorboard", "wandb")
"""Files deleted when a run begins anew. The options and the model's files are replaced, all other files are kept."""


@dataclass(frozen=True)
class RunDirectory:
    """Directory that a run is written to."""

    path: Path
    """The directory, created if it does not exist."""
    tokenizer: Tokenizer | None = None
    """Saved beside the model, so that the run alone is enough to generate text."""
    template: str | None = None
    """The source of the model's chat template, saved there as well."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """Further entries of train.json."""
    existing: Existing = "refuse"
    """Action if the directory holds a run with checkpoints. A run killed before its first checkpoint begins anew.
    Only "overwrite" replaces trained weights that have no checkpoints."""

    def check(self) -> None:
        """Raise FileExistsError unless a run may begin or resume here. Changes nothing."""
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"{self.path} is a file: choose a folder for the run (`out`)")
        if (self.path / "meta.json").exists():
            raise FileExistsError(f"{self.path} holds packed data: choose another folder for the run (`out`)")
        if not (self.path / "train.json").exists():
            if (self.path / "model.safetensors").exists() or (self.path / "config.json").exists():
                raise FileExistsError(f"{self.path} holds a model that is no run: choose another `out`")
            others = sorted(f.name for f in self.path.glob("[!.]*"))
            if others:  # files that begin with a dot may be left by a run that was killed early, such as its lock
                raise FileExistsError(f"{self.path} holds other things ({others[0]}): choose a new or an empty folder")
        elif self.existing == "refuse" and folders(self.path):
            raise FileExistsError(
                f"{self.path} already holds a run: `resume=True` goes on with it, `overwrite=True` begins anew, "
                f"or choose another `out`"
            )
        elif self.existing != "overwrite" and not folders(self.path) and self._trained:
            raise FileExistsError(
                f"{self.path} holds a trained model but no checkpoint to go on from: `overwrite=True` begins anew, "
                f"{option('init', self.path)} with another `out` trains on from it"
            )

    def check_shared(self, cluster: Cluster) -> None:
        """Raise ValueError unless all ranks see this directory: each writes its part of a checkpoint there."""
        if cluster.world_size == 1:
            return
        number = cluster.broadcast(secrets.randbits(60))  # a new name: no file system has cached its absence
        token = self.path / f".seen-{number}"
        with cluster.barrier():
            if cluster.main:
                token.touch()
        try:
            with cluster.barrier():
                if not token.exists():
                    raise ValueError(f"{self.path} is another folder than that of rank 0: give one that all share")
        finally:
            if cluster.main:
                token.unlink(missing_ok=True)

    def write_options(self, config: TrainConfig) -> None:
        """Writes train.json: the options of training, and the record."""
        write_json(self.path / "train.json", {"train": asdict(config), **self.record})

    @property
    def _trained(self) -> bool:
        """True if the directory holds trained weights, not just initial ones."""
        return (self.path / "model.safetensors").exists() and not (self.path / UNTRAINED).exists()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Create and prepare the directory, and lock it against other processes in this block.

        Raises:
            BlockingIOError: another process is training there.
            FileExistsError: as `check`.
        """
        self.check()
        make_folder(self.path)
        try:
            with FileLock(self.path / ".lock", timeout=0):
                self.check()  # again: another process may have begun a run here before this one held the lock
                if self.existing == "overwrite" or not folders(self.path):
                    self._clear()
                yield
        except Timeout:
            raise BlockingIOError(f"another process is training the run at {self.path}: wait, or stop that") from None

    def _clear(self) -> None:
        for name in DELETED:
            path, old = self.path / name, self.path / f".{name}.old"
            shutil.rmtree(old, ignore_errors=True)  # left by a process that was killed here
            if path.is_dir():
                path.rename(old)  # deleting takes time: if killed midway, half a checkpoint must not count as one
                shutil.rmtree(old)
            else:
                path.unlink(missing_ok=True)


def read_options(run: Path) -> dict[str, Any]:
    """Content of a run's train.json, or {} without one.

    Raises:
        ValueError: the file is damaged.
    """
    file = run / "train.json"
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        _ = found["train"]["precision"]  # a run's options have at least this
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} does not hold a run's options ({error}): the run cannot go on") from None
    return found
