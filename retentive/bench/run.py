"""Files of a bench: the result with its command and table, and a picture beside it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from retentive.files import write_json, write_together
from retentive.tables import counted


def keep(path: Path, bench: Any, result: dict[str, Any], command: str) -> None:
    """Writes the result and its picture, each whole or not at all; the result first, since plotting may fail.

    Args:
        bench: module of the shape that `retentive.bench` describes.
        command: command line that measured.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (extra `plot`); the result is written.
    """
    # with the table, so that a report shows it without the code that measured
    write_json(path, {"command": command, **result, "table": bench.table(result)})
    if bench.PICTURE is not None:
        draw(path, bench.plot, result, title_of(bench, result))


def title_of(bench: Any, result: dict[str, Any]) -> str:
    """Title of a result's picture: the bench's PICTURE and the machine."""
    machine = result["hardware"]
    where = f"{machine['cpu']}, {counted(machine['threads'], 'thread')}"
    if result.get("device", "cpu") != "cpu":
        where = machine["gpu"]
    return f"{bench.PICTURE.format(**result)} on {where}"


def draw(path: Path, plot: Callable[..., None], result: dict[str, Any], title: str) -> None:
    """Writes the picture of a result beside its file `path`."""
    write_together({path.with_suffix(".png"): lambda partial: plot(result, partial, title=title)})
