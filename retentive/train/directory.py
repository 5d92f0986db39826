"""A run directory: where a run is written, by one process at a time, and what is done where a run is there already.

RUN/config.json tokenizer.json model.safetensors    what `retentive.load` reads
RUN/train.json                                      the options, for the record and to resume the run
RUN/metrics.jsonl                                   a line per step, evaluation and sample
RUN/checkpoints/                                    what a resumed run goes on from, see `checkpoints`
RUN/.lock                                           locked by the process that trains it; the file itself stays
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
"""What is deleted when a run begins anew. The options and the model's files are replaced, all other files are kept."""


@dataclass(frozen=True)
class RunDirectory:
    """Where a run is written."""

    path: Path
    """The directory, made if it does not exist."""
    tokenizer: Tokenizer | None = None
    """Saved beside the model, so that the run alone is enough to generate text."""
    template: str | None = None
    """The source of the model's chat template, saved there as well."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """What else is kept in train.json."""
    existing: Existing = "refuse"
    """What is done where a run has left checkpoints; one that was killed before its first is begun anew: nothing is
    lost. Trained weights whose checkpoints are gone are lost by "overwrite" alone."""

    def check(self) -> None:
        """Raises FileExistsError unless a run may begin or go on here. Changes nothing."""
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"{self.path} is a file: choose a folder for the run (`out`)")
        if (self.path / "meta.json").exists():
            raise FileExistsError(f"{self.path} holds packed data: choose another folder for the run (`out`)")
        if not (self.path / "train.json").exists():
            if (self.path / "model.safetensors").exists() or (self.path / "config.json").exists():
                raise FileExistsError(f"{self.path} holds a model that is no run: choose another `out`")
            others = sorted(f.name for f in self.path.glob("[!.]*"))
            if others:  # what begins with a dot may be of a run that was killed as it began, such as its lock
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
        """Raises ValueError unless all ranks see this directory: each writes its part of what is saved there."""
        if cluster.world_size == 1:
            return
        number = cluster.broadcast(secrets.randbits(60))  # a new name: no machine remembers its absence
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
        """True if there are weights, and others than those that a run begins with."""
        return (self.path / "model.safetensors").exists() and not (self.path / UNTRAINED).exists()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the directory, ready for the run, and keeps other processes out of it in this block.

        Raises:
            BlockingIOError: another process is training there.
            FileExistsError: as `check`.
        """
        self.check()
        make_folder(self.path)
        try:
            with FileLock(self.path / ".lock", timeout=0):
                self.check()  # again: another process may have begun a run there before this one had the lock
                if self.existing == "overwrite" or not folders(self.path):
                    self._clear()
                yield
        except Timeout:
            raise BlockingIOError(f"another process is training the run at {self.path}: wait, or stop that") from None

    def _clear(self) -> None:
        for name in DELETED:
            path, old = self.path / name, self.path / f".{name}.old"
            shutil.rmtree(old, ignore_errors=True)  # of a process that was killed here
            if path.is_dir():
                path.rename(old)  # deleting takes time: killed in between, half a checkpoint must not count as one
                shutil.rmtree(old)
            else:
                path.unlink(missing_ok=True)


def read_options(run: Path) -> dict[str, Any]:
    """The content of a run's train.json; {} where there is none.

    Raises:
        ValueError: it is damaged.
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
