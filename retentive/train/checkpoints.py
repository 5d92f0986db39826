"""Training checkpoints: all that is needed to go on exactly, in safetensors and JSON. Each folder is whole or absent.

RUN/checkpoints/step-00000500/   model.safetensors  optimizer.safetensors  training.json  [state.safetensors]
                                 [ema.safetensors: the model with the averaged weights]
RUN/model.safetensors            the newest of those weights, averaged ones if there are, which `retentive.load` reads
RUN/.untrained                   there until the first checkpoint: those weights are the initial ones

The state of the random numbers is not kept: the loop seeds them anew at every step.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from retentive.checkpoint.adapter import adapter_of
from retentive.files import load_tensors, replace_folder, save_tensors, write_json
from retentive.models.state import State, load_state
from retentive.train.ema import EMA
from retentive.train.parallel import local, part_like, part_of_state, whole, whole_state
from retentive.train.processes import ALONE, Processes

UNTRAINED = ".untrained"
AVERAGED = "ema.safetensors"
MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")
"""What optimisers keep of a parameter: AdamW the first three (fused, its step is a tensor there too), Muon the last."""
T = TypeVar("T")


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
        write_json(folder / "training.json", {"step": step})

    folder = run / "checkpoints" / f"step-{step:08d}"  # with zeros, so that names sort by step
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


def folders(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(p.parent for p in (run / "checkpoints").glob("step-*/training.json"))


def step_of(folder: Path) -> int:
    """The finished steps of a checkpoint.

    Raises:
        ValueError: its training.json is damaged.
    """
    try:
        step = json.loads((folder / "training.json").read_text(encoding="utf-8"))["step"]
    except (ValueError, KeyError, TypeError):
        step = None
    if type(step) is not int or folder.name != f"step-{step:08d}":
        raise damaged(folder / "training.json")
    return step


def damaged(file: Path) -> ValueError:
    """What to raise for a file of a run's newest checkpoint that cannot be read."""
    folder, run = file.parent, file.parent.parent.parent
    remedy = f"delete {folder} to go on from the one before it"
    if len(folders(run)) == 1:
        remedy = (
            f"there is no other checkpoint: --overwrite begins anew, --init {run} --out NEW trains on from the model"
        )
    return ValueError(f"{file} is damaged: {remedy}")


def read(file: Path, load: Callable[[Path], T]) -> T:
    """What `load` finds in a file of a checkpoint; raises ValueError, with what to do, where it is damaged or gone."""
    try:
        return load(file)
    except (ValueError, FileNotFoundError):
        raise damaged(file) from None


def restore(
    run: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None = None,
    here: Processes = ALONE,
) -> tuple[int, State | None]:
    """(finished steps, carried state) of the newest checkpoint, which is loaded into the model and the optimiser.

    And the averages into `ema`. Without a checkpoint, (0, None). Each process reads its part of it, however many have
    written it.

    Raises:
        ValueError: one of its files is damaged.
    """
    for rest in (run / "checkpoints").glob(".step-*") if here.main else ():  # of a save that was killed
        shutil.rmtree(rest)
    found = folders(run)
    if not found:
        return 0, None
    folder = found[-1]
    step = step_of(folder)
    weights, moments = (read(folder / f"{name}.safetensors", load_tensors)[0] for name in ("model", "optimizer"))
    carried = folder / "state.safetensors"
    state = read(carried, load_state) if carried.is_file() else None
    averaged = read(folder / AVERAGED, load_tensors)[0] if ema else {}
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
        publish(run, folder)  # a process killed after saving may not have come to it
    return step, part_of_state(state, here)
