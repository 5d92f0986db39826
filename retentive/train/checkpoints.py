"""Training checkpoints in safetensors and JSON: a run resumes from one exactly. Each folder is complete or absent.

RUN/checkpoints/step-00000500/   model.safetensors  optimizer.safetensors  training.json  [state.safetensors]
                                 [ema.safetensors: the model with the averaged weights]
RUN/checkpoints/damaged-step-…   a checkpoint whose files had changed: the run resumed from the one before it
RUN/model.safetensors            weights of the newest checkpoint, averaged ones if any: `retentive.load` reads them
RUN/.untrained                   exists until the first checkpoint: the weights are still the initial ones

Random number generators are not saved: the loop seeds them anew at every step.
"""

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from retentive.checkpoint.folder import UNTRAINED
from retentive.checkpoint.save import save_all_but_weights, saved
from retentive.data.tokenizer import Tokenizer
from retentive.files import file_crc32, naming, write_json
from retentive.models import LanguageModel
from retentive.models.state import State, load_state
from retentive.options import option
from retentive.train.parallel import ALONE, Cluster
from retentive.train.parallel import checkpoint as sharded
from retentive.train.parallel.checkpoint import UNSEALED, Shard, part_of_state, shard_of, sharded_as, whole_state
from retentive.train.parallel.data import local
from retentive.train.step import Training

AVERAGED = "ema.safetensors"
MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")
"""Optimiser state of a parameter: AdamW keeps the first three (the fused one's step is a tensor), Muon the last."""


class Contents(NamedTuple):
    """This rank's part of a checkpoint."""

    step: int
    files: dict[str, tuple[dict[str, Shard], dict[str, str]]]
    """(tensors, metadata) by file name."""
    state: State | None
    """State of all ranks' rows."""

    def copied(self) -> "Contents":
        """A copy in other memory, so that training can continue while it is written."""
        files = {file: ({n: x.copied() for n, x in part.items()}, about) for file, (part, about) in self.files.items()}
        return Contents(self.step, files, self.state and self.state.clone())


def contents(training: Training) -> Contents:
    """The checkpoint after the finished steps; all ranks must call this."""
    cluster, ema = training.cluster, training.ema
    weights, moments = weights_of(training.model, cluster), dict[str, Shard]()
    for name, p in saved(training.model):
        kept = training.optimizer.state.get(p, {})
        moments |= {f"{key}.{name}": shard_of(name, x, cluster) for key, x in kept.items()}
    files = {"model.safetensors": (weights, dict(UNSEALED)), "optimizer.safetensors": (moments, dict[str, str]())}
    if ema:
        averages = {name: shard_of(name, mean, cluster) for name, mean in ema.mean.items()}
        files[AVERAGED] = (weights | averages, {"weights": f"averages, decay {ema.decay}", **UNSEALED})
    return Contents(training.step, files, whole_state(training.carried, cluster))


def write_first(
    run: Path, model: LanguageModel, tokenizer: Tokenizer | None, template: str | None, cluster: Cluster = ALONE
) -> None:
    """Write the initial weights, so that the run can be loaded as a model folder before its first checkpoint.

    All ranks must call this.

    Raises:
        OSError: the disk is full or not writable.
    """
    weights, partial = weights_of(model, cluster), run / ".model.safetensors.partial"
    try:
        with cluster.barrier(), naming(run):
            if cluster.main:
                (run / UNTRAINED).touch()
                sharded.begin(partial, weights, UNSEALED)
        with cluster.barrier(), naming(run):
            sharded.write(partial, weights, UNSEALED)
        with cluster.barrier(), naming(run):
            if cluster.main:
                sharded.seal(partial)
                partial.replace(run / "model.safetensors")
                save_all_but_weights(run, model, tokenizer, template=template)
    finally:
        if cluster.main:
            partial.unlink(missing_ok=True)


def weights_of(model: nn.Module, cluster: Cluster) -> dict[str, Shard]:
    """This rank's shards of the parameters that are saved, by name."""
    return {name: shard_of(name, p, cluster) for name, p in saved(model)}


def write(run: Path, found: Contents, keep: int, cluster: Cluster = ALONE) -> Path:
    """Write a checkpoint, publish its weights as the run's, and return its folder.

    All ranks must call this. Each writes its part of every file, so that any number of ranks can resume.

    Args:
        keep: number of newest checkpoints to keep; older ones are deleted.

    Raises:
        OSError: the disk is full or not writable; the checkpoints that were there remain.
    """
    folder = folder_of(run, found.step)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        with cluster.barrier(), naming(folder):
            if cluster.main:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                for name, (part, about) in found.files.items():
                    sharded.begin(partial / name, part, about)
        with cluster.barrier(), naming(folder):
            for name, (part, about) in found.files.items():
                sharded.write(partial / name, part, about)
        with cluster.barrier(), naming(folder):
            if cluster.main:
                if found.state is not None:
                    found.state.save(partial / "state.safetensors")
                for name in found.files:
                    sharded.seal(partial / name)
                sums = {file.name: file_crc32(file) for file in sorted(partial.iterdir())}
                write_json(partial / "training.json", {"step": found.step, "crc32": sums})
                shutil.rmtree(folder, ignore_errors=True)  # an incomplete folder without training.json
                partial.replace(folder)
                publish(run, folder)
                # Delete old ones last: a process killed at any moment leaves at least one complete checkpoint.
                for old in folders(run)[:-keep]:
                    shutil.rmtree(old)
    finally:
        if cluster.main:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


class Writer:
    """Writes the checkpoints of a run, one after the other.

    Args:
        background: write while training continues, from a copy in CPU memory. An error is raised at the next `save`,
            or at the end.
    """

    def __init__(self, run: Path, keep: int, cluster: Cluster = ALONE, *, background: bool = False):
        self.run, self.keep, self.cluster = run, keep, cluster
        self._for_thread = cluster.for_thread() if background else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, found: Contents) -> None:
        """Write a checkpoint, as `write` does. In the background, waits for the previous one first."""
        self.wait()
        if self._for_thread is None:
            write(self.run, found, self.keep, self.cluster)
            return
        self._thread = threading.Thread(target=self._write, args=(found.copied(), self._for_thread), daemon=True)
        self._thread.start()

    def _write(self, found: Contents, cluster: Cluster) -> None:
        try:
            write(self.run, found, self.keep, cluster)
        except BaseException as error:  # raised by `wait`, in the thread that trains
            self._error = error

    def wait(self) -> None:
        """Wait for the background write to finish, and raise its error if it failed."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not KeyboardInterrupt:  # a second Ctrl-C: the user does not want to wait
            self.wait()


def publish(run: Path, folder: Path) -> None:
    """Make the checkpoint's weights the run's, by a hard link if the file system supports it, else by a copy."""
    partial, target = run / ".model.safetensors.partial", run / "model.safetensors"
    source = folder / AVERAGED if (folder / AVERAGED).is_file() else folder / "model.safetensors"
    partial.unlink(missing_ok=True)  # left by a process that was killed here
    # renaming one link to a file over another does nothing (POSIX), and `partial` would remain
    if not (target.exists() and target.samefile(source)):
        try:
            os.link(source, partial)
        except OSError:  # no hard links, as on FAT
            shutil.copyfile(source, partial)
        partial.replace(target)
    (run / UNTRAINED).unlink(missing_ok=True)


def folder_of(run: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` finished steps, padded with zeros so that names sort by step."""
    return run / "checkpoints" / f"step-{step:08d}"


def folders(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(p.parent for p in (run / "checkpoints").glob("step-*/training.json"))


class Damaged(ValueError):
    """Error for a damaged checkpoint: `file` has changed since it was written."""

    def __init__(self, file: Path):
        super().__init__(f"{file} is damaged")
        self.file = file


def check(folder: Path) -> int:
    """Verify a checkpoint by the checksums in its training.json (older ones have none); return its finished steps.

    Raises:
        Damaged: one of its files is truncated, changed or missing.
    """
    file = folder / "training.json"
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        step, sums = about["step"], about.get("crc32", {})
        if type(step) is not int or folder.name != f"step-{step:08d}":
            raise Damaged(file)
        for name in {"model.safetensors", "optimizer.safetensors", *sums} | {
            f.name for f in folder.glob("*.safetensors")
        }:
            file = folder / name
            if name in sums and file_crc32(file) != sums[name]:
                raise Damaged(file)
            with safe_open(file, framework="pt"):  # raises if the file is shorter than its header says
                pass
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError, SafetensorError):
        raise Damaged(file) from None
    return step


def newest_whole(run: Path, tell: Callable[[str], None]) -> int:
    """Finished steps of the newest undamaged checkpoint, or 0. Renames damaged ones and reports them by `tell`.

    Raises:
        ValueError: all checkpoints are damaged.
    """
    for rest in (run / "checkpoints").glob(".step-*"):  # left by a save that was killed
        shutil.rmtree(rest)
    bad = list[Path]()
    for folder in reversed(folders(run)):
        try:
            step = check(folder)
        except Damaged as error:
            bad.append(error.file)
            continue
        for file in bad:
            aside = file.parent.with_name(f"damaged-{file.parent.name}")
            shutil.rmtree(aside, ignore_errors=True)
            file.parent.rename(aside)
            tell(f"{file} is damaged: put aside as {aside.name}, going on from step {step}")
        publish(run, folder)  # a process killed right after saving may not have published it
        return step
    if bad:
        remedy = f"`overwrite=True` begins anew, {option('init', run)} with another `out` trains on from the model"
        raise ValueError(f"{bad[0]} is damaged: there is no other whole checkpoint: {remedy}")
    return 0


def restore(run: Path, step: int, training: Training) -> None:
    """Loads the checkpoint of `step` finished steps: weights, moments, averages and the carried state.

    Each rank reads its own part, however many ranks wrote it.

    Raises:
        FileNotFoundError: this rank does not find the checkpoint.
        ValueError: its tensors are not those of the model.
    """
    folder, cluster, ema = folder_of(run, step), training.cluster, training.ema
    with ExitStack() as opened, _naming_foreign(folder):

        def file(name: str) -> Any:
            return opened.enter_context(safe_open(folder / name, framework="pt"))

        weights, moments = file("model.safetensors"), file("optimizer.safetensors")
        averages, names = file(AVERAGED) if ema else None, set(moments.keys())
        with torch.no_grad():
            for name, p in saved(training.model):
                like = shard_of(name, p, cluster)
                # in place: the optimiser holds these very tensors
                like.own.copy_(sharded.read(weights, name, like))
                if ema and name in ema.mean:
                    local(ema.mean[name], cluster).copy_(sharded.read(averages, name, like))
                if p.requires_grad:
                    kept = {key: f"{key}.{name}" for key in MOMENTS if f"{key}.{name}" in names}
                    found = {key: sharded.read(moments, its, like) for key, its in kept.items()}
                    training.optimizer.state[p] = {key: sharded_as(p, x, cluster) for key, x in found.items()}
    state = folder / "state.safetensors"
    training.carried = part_of_state(load_state(state), cluster) if state.is_file() else None
    training.step = step


@contextmanager
def _naming_foreign(folder: Path) -> Iterator[None]:
    """Name the checkpoint in errors about missing tensors or tensors of another shape."""
    try:
        yield
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} is not of the model that config.json describes: {error}") from None
