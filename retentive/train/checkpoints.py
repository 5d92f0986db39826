"""Training checkpoints: all that is needed to go on exactly, in safetensors and JSON. Each folder is whole or absent.

RUN/checkpoints/step-00000500/   model.safetensors  optimizer.safetensors  training.json  [state.safetensors]
                                 [ema.safetensors: the model with the averaged weights]
RUN/checkpoints/damaged-step-…   one whose files were found to have changed: the one before it went on instead
RUN/model.safetensors            the newest of those weights, averaged ones if there are, which `retentive.load` reads
RUN/.untrained                   there until the first checkpoint: those weights are the initial ones

The state of the random numbers is not kept: the loop seeds them anew at every step.
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
"""What optimisers keep of a parameter: AdamW the first three (fused, its step is a tensor there too), Muon the last."""


class Contents(NamedTuple):
    """What this rank writes of a checkpoint."""

    step: int
    files: dict[str, tuple[dict[str, Shard], dict[str, str]]]
    """(tensors, metadata) by the names of the files."""
    state: State | None
    """Of all ranks."""

    def copied(self) -> "Contents":
        """The same in other memory, so that training can go on in its own."""
        files = {file: ({n: x.copied() for n, x in part.items()}, about) for file, (part, about) in self.files.items()}
        return Contents(self.step, files, self.state and self.state.clone())


def contents(training: Training) -> Contents:
    """The checkpoint of the steps that are finished; all ranks must call this."""
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
    """Makes the run a model folder of the initial weights, so that it can be loaded before its first checkpoint.

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
    """What this rank has of the parameters that are saved."""
    return {name: shard_of(name, p, cluster) for name, p in saved(model)}


def write(run: Path, found: Contents, keep: int, cluster: Cluster = ALONE) -> Path:
    """The folder of a checkpoint, once written; its weights are the run's from then on.

    All ranks must call this. Each writes its part of every file, so that any other number of them can go on.

    Args:
        keep: checkpoints that remain, the newest; older ones are deleted.

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
                shutil.rmtree(folder, ignore_errors=True)  # what somebody took training.json from
                partial.replace(folder)
                publish(run, folder)
                # The old ones last: a process killed at any moment leaves at least one whole checkpoint.
                for old in folders(run)[:-keep]:
                    shutil.rmtree(old)
    finally:
        if cluster.main:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


class Writer:
    """Writes the checkpoints of a run, one after the other.

    Args:
        background: while training goes on, from a copy in the memory of the CPU. What fails then is raised where the
            next one is to be written, or at the end.
    """

    def __init__(self, run: Path, keep: int, cluster: Cluster = ALONE, *, background: bool = False):
        self.run, self.keep, self.cluster = run, keep, cluster
        self._for_thread = cluster.for_thread() if background else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, found: Contents) -> None:
        """Writes a checkpoint, as `write`; in the background, once the one before is written."""
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
        """Returns once nothing is being written; raises what has failed meanwhile."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not KeyboardInterrupt:  # of a user who does not wait any longer
            self.wait()


def publish(run: Path, folder: Path) -> None:
    """Makes the checkpoint's weights the run's: by a hard link where the file system has them, else by a copy."""
    partial, target = run / ".model.safetensors.partial", run / "model.safetensors"
    source = folder / AVERAGED if (folder / AVERAGED).is_file() else folder / "model.safetensors"
    partial.unlink(missing_ok=True)  # of a process that was killed here
    # renaming one link to a file over another does nothing (POSIX), and `partial` would remain
    if not (target.exists() and target.samefile(source)):
        try:
            os.link(source, partial)
        except OSError:  # no hard links, as on FAT
            shutil.copyfile(source, partial)
        partial.replace(target)
    (run / UNTRAINED).unlink(missing_ok=True)


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of so many finished steps lies: with zeros, so that names sort by step."""
    return run / "checkpoints" / f"step-{step:08d}"


def folders(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(p.parent for p in (run / "checkpoints").glob("step-*/training.json"))


class Damaged(ValueError):
    """A checkpoint of which `file` is not as it was written."""

    def __init__(self, file: Path):
        super().__init__(f"{file} is damaged")
        self.file = file


def check(folder: Path) -> int:
    """The finished steps of a whole checkpoint, held against the sums in its training.json (which older ones lack).

    Raises:
        Damaged: a file of it is cut short, changed, or gone.
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
            with safe_open(file, framework="pt"):  # raises where it is shorter than its header says
                pass
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError, SafetensorError):
        raise Damaged(file) from None
    return step


def newest_whole(run: Path, tell: Callable[[str], None]) -> int:
    """The steps of the newest checkpoint that is whole; 0 where there is none. Damaged ones are put aside, and told of.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    for rest in (run / "checkpoints").glob(".step-*"):  # of a save that was killed
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
        publish(run, folder)  # a process killed after saving may not have come to it
        return step
    if bad:
        remedy = f"`overwrite=True` begins anew, {option('init', run)} with another `out` trains on from the model"
        raise ValueError(f"{bad[0]} is damaged: there is no other whole checkpoint: {remedy}")
    return 0


def restore(run: Path, step: int, training: Training) -> None:
    """Loads the checkpoint of `step` finished steps: weights, moments, averages and the carried state.

    Each rank reads its part of it, however many have written it.

    Raises:
        FileNotFoundError: this rank does not find it.
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
    """Errors of tensors that the model does not have, or has in another shape, name the checkpoint."""
    try:
        yield
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} is not of the model that config.json describes: {error}") from None
