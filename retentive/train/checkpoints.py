"""Training checkpoints: everything to go on exactly, in safetensors and JSON, each folder whole or absent.

RUN/checkpoints/step-00000500/   model.safetensors  optimizer.safetensors  training.json  [state.safetensors]
RUN/model.safetensors            the newest of those weights, for whoever loads the run
"""

import json
import os
import shutil
from pathlib import Path

import torch
from torch import nn

from retentive.checkpoint.io import read_file
from retentive.files import replace_folder, save_tensors, write_json
from retentive.models.state import State, load_state


def save(
    run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, step: int, state: State | None, keep: int
) -> Path:
    """Write the checkpoint of `step` finished steps, point the run's weights at it, drop all but the newest `keep`.

    Raises:
        OSError: the disk is full or not writable; the checkpoints that were there remain.
    """
    named = {name: p.detach() for name, p in model.named_parameters()}
    moments = {}
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            moments[f"{key}.{name}"] = value.detach()

    def write(folder: Path) -> None:
        save_tensors(folder / "model.safetensors", named)
        save_tensors(folder / "optimizer.safetensors", moments)
        if state is not None:
            state.save(folder / "state.safetensors")
        write_json(folder / "training.json", {"step": step})

    folder = run / "checkpoints" / f"step-{step:08d}"
    replace_folder(folder, write)
    publish(run, folder)
    for old in folders(run)[:-keep]:
        shutil.rmtree(old)
    return folder


def publish(run: Path, folder: Path) -> None:
    """Make the checkpoint's weights the run's: a hard link where the file system has them, else a copy."""
    partial, target = run / ".model.safetensors.partial", run / "model.safetensors"
    partial.unlink(missing_ok=True)
    if target.exists() and target.samefile(folder / "model.safetensors"):
        return  # a rename between two links to one file does nothing, and would leave the other link there
    try:
        os.link(folder / "model.safetensors", partial)
    except OSError:
        shutil.copyfile(folder / "model.safetensors", partial)
    partial.replace(target)


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
        raise ValueError(f"{folder / 'training.json'} is damaged: delete {folder} to go on from the one before it")
    return step


def restore(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, State | None]:
    """Load the newest checkpoint into model and optimiser: (finished steps, carried state); (0, None) without one."""
    for rest in (run / "checkpoints").glob(".step-*"):  # of a save that was killed
        shutil.rmtree(rest)
    found = folders(run)
    if not found:
        return 0, None
    folder = found[-1]
    step = step_of(folder)
    weights, moments = read_file(folder / "model.safetensors"), read_file(folder / "optimizer.safetensors")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
            if p.requires_grad:  # fused AdamW keeps its step count beside the moments, on their device
                keys = ("step", "exp_avg", "exp_avg_sq")
                optimizer.state[p] = {key: moments[f"{key}.{name}"].to(p.device) for key in keys}
    state = load_state(folder / "state.safetensors") if (folder / "state.safetensors").is_file() else None
    publish(run, folder)
    return step, state
