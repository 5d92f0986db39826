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
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from retentive.checkpoint.adapter import adapter_of
from retentive.checkpoint.io import UNTRAINED
from retentive.files import file_crc32, load_tensors, replace_folder, save_tensors, write_json
from retentive.models.state import State, load_state
from retentive.train.ema import EMA
from retentive.train.parallel import local, part_like, part_of_state, whole, whole_state
from retentive.train.processes import ALONE, Processes

AVERAGED = "ema.safetensors"
MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")
"""What optimisers keep of a parameter: AdamW the first three (fused, its step is a tensor there too), Muon the last."""


def save(
    run: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None = None,
    *,
    step: int,
    state: State | None,
    keep: int,
    here: Processes = ALONE,
) -> Path:
    """The folder of the checkpoint of `step` finished steps, once written; its weights are the run's from then on.

    Args:
        state: what the next batch goes on from (mode "carry"), or None.
        keep: checkpoints that remain, the newest; older ones are deleted.
        here: the processes that train together. All call this, the first one writes: what is divided between them is
            put together, so that any other number of them can go on from it.

    Raises:
        OSError: the disk is full or not writable; the checkpoints that were there remain.
    """
    named, moments = dict[str, Tensor](), dict[str, Tensor]()
    for name, p in saved(model):
        for key, value in {"": p, **optimizer.state.get(p, {})}.items():
            x = whole(name, value, here)  # one at a time: only the first process keeps it
            if here.main:
                (moments if key else named)[f"{key}.{name}" if key else name] = x.cpu() if here.divided else x
    averaged = {name: whole(name, mean, here).cpu() for name, mean in (ema.mean if ema else {}).items()}
    state = whole_state(state, here)

    def write(folder: Path) -> None:
        save_tensors(folder / "model.safetensors", named)
        if ema:
            save_tensors(folder / AVERAGED, named | averaged, {"weights": f"averages, decay {ema.decay}"})
        save_tensors(folder / "optimizer.safetensors", moments)
        if state is not None:
            state.save(folder / "state.safetensors")
        sums = {file.name: file_crc32(file) for file in sorted(folder.iterdir())}
        write_json(folder / "training.json", {"step": step, "crc32": sums})

    folder = folder_of(run, step)
    with here.together():
        if here.main:
            replace_folder(folder, write)
            publish(run, folder)
            # The old ones last: a process killed at any moment leaves at least one whole checkpoint.
            for old in folders(run)[:-keep]:
                shutil.rmtree(old)
    return folder


def saved(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that are saved, by name: all, or those of an adapter, which leaves the others as they are."""
    adapter = adapter_of(model)
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad or not adapter]


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


class Contents(NamedTuple):
    """What a checkpoint holds, as it was written: of all processes."""

    step: int
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    averages: dict[str, Tensor]
    state: State | None


def read(folder: Path, *, averages: bool = False) -> Contents:
    """A whole checkpoint, held against the sums in its training.json (which older ones lack).

    Raises:
        Damaged: a file of it is cut short, changed, or gone.
    """
    file = folder / "training.json"
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        step, sums = about["step"], about.get("crc32", {})
        if type(step) is not int or folder.name != f"step-{step:08d}":
            raise Damaged(file)
        for name, wanted in sums.items():
            file = folder / name
            if file_crc32(file) != wanted:
                raise Damaged(file)

        def tensors(name: str) -> dict[str, Tensor]:
            nonlocal file
            file = folder / name
            return load_tensors(file)[0]

        weights, moments = tensors("model.safetensors"), tensors("optimizer.safetensors")
        averaged = tensors(AVERAGED) if averages else {}
        file = folder / "state.safetensors"
        return Contents(step, weights, moments, averaged, load_state(file) if file.is_file() else None)
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError):
        raise Damaged(file) from None


def newest_whole(run: Path, here: Processes, tell: Callable[[str], None], *, averages: bool) -> Contents | None:
    """The newest checkpoint that is whole; None where there is none at all. Damaged ones are put aside, and told of.

    Raises:
        ValueError: all of them are damaged.
    """
    bad = list[Path]()
    for folder in reversed(folders(run)):
        try:
            found = read(folder, averages=averages)
        except Damaged as error:
            bad.append(error.file)
            continue
        for file in bad if here.main else ():
            aside = file.parent.with_name(f"damaged-{file.parent.name}")
            shutil.rmtree(aside, ignore_errors=True)
            file.parent.rename(aside)
            tell(f"{file} is damaged: put aside as {aside.name}, going on from step {found.step}")
        return found
    if bad:
        remedy = f"--overwrite begins anew, --init {run} --out NEW trains on from the model"
        raise ValueError(f"{bad[0]} is damaged: there is no other whole checkpoint: {remedy}")
    return None


def restore(
    run: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None,
    here: Processes,
    tell: Callable[[str], None],
) -> tuple[int, State | None]:
    """(finished steps, carried state) of the newest whole checkpoint, which is loaded into the model and the optimiser.

    And the averages into `ema`. Without a checkpoint, (0, None). Each process reads its part of it, however many have
    written it. What `tell` is given is for the user: a damaged checkpoint is put aside.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    for rest in (run / "checkpoints").glob(".step-*") if here.main else ():  # of a save that was killed
        shutil.rmtree(rest)
    found = newest_whole(run, here, tell, averages=ema is not None)
    if found is None:
        return 0, None
    step, weights, moments, averaged, state = found
    with torch.no_grad():
        for name, p in saved(model):
            # in place: the optimiser holds these very tensors
            local(p, here).copy_(local(part_like(name, weights[name], p, here), here))
            if ema and name in ema.mean:
                local(ema.mean[name], here).copy_(local(part_like(name, averaged[name], p, here), here))
            if p.requires_grad:
                kept = {key: moments[f"{key}.{name}"] for key in MOMENTS if f"{key}.{name}" in moments}
                optimizer.state[p] = {key: part_like(name, x, p, here) for key, x in kept.items()}
    if here.main:
        publish(run, folder_of(run, step))  # a process killed after saving may not have come to it
    return step, part_of_state(state, here)
