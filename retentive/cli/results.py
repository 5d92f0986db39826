"""What the commands that measure share: names and devices in, a result file with its picture out."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from retentive.files import write_json, write_together
from retentive.machine import pick_device


def words(names: tuple[str, ...]) -> list[str]:
    """Names with commas or blanks between them."""
    return [part for name in names for part in name.split(",") if part]


def bench_device(name: str) -> torch.device:
    """The device of that name; "auto" is an NVIDIA GPU or the CPU, which are what these measure."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return pick_device(name)


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def keep_with_picture(path: Path | None, result: dict[str, Any], plot: Callable[..., None], what: str) -> None:
    """Write a result and its picture, each whole or not at all."""
    if path is None:
        return
    keep(path, result)
    hardware = result["hardware"]
    where = f"{hardware['cpu']}, {hardware['threads']} threads" if result["device"] == "cpu" else hardware["gpu"]
    title = f"{what} on {where}"
    write_together({path.with_suffix(".png"): lambda partial: plot(result, partial, title=title)})


def keep(path: Path, result: dict) -> None:
    """Write a result file, its folder made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
