"""The record of a run of a comparison: OUT/NAME/compared.json, written last, so that it says that the run is done."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

RECORD = "compared.json"
"""The file in a run's directory with its result."""
MACHINE = ("cpu", "threads", "gpu")
"""What of the hardware must be the same for all runs of one table, since speeds and memory are compared."""


class Run(NamedTuple):
    """One training run of a comparison."""

    variant: str
    size: str
    seed: int
    lr: float

    @property
    def name(self) -> str:
        """The name of its directory."""
        return f"{self.variant}_{self.size}_lr{self.lr:g}_seed{self.seed}"


def read_record(file: Path) -> dict[str, Any]:
    """The content of a record.

    Raises:
        ValueError: it is damaged.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        _ = found["name"], found["about"]["train"], [found["hardware"][key] for key in MACHINE]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is damaged ({type(error).__name__}: {error}): delete it, and the run is scored again"
        ) from None
    return found


def records(out: Path, runs: Iterable[Run]) -> list[dict[str, Any]]:
    """The records of those runs that are done."""
    files = [out / run.name / RECORD for run in runs]
    return [read_record(file) for file in files if file.is_file()]


def check_done(file: Path, wanted: dict[str, Any]) -> None:
    """Raises ValueError where the run that left this record had other options than those that are wanted."""
    about = read_record(file)["about"]
    had, want = (x | x["train"] for x in (about, wanted))  # the options of training beside the others, by their names
    for name in want:
        if name != "train" and had.get(name) != want[name]:
            raise ValueError(
                f"{file.parent} is of another comparison ({name} {had.get(name)}, now {want[name]}): "
                f"choose another --out"
            )


def machines(results: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """One result of each kind of machine, by what tells the kinds apart."""
    return {", ".join(f"{key} {r['hardware'][key]}" for key in MACHINE): r for r in results}


def check_hardware(results: Sequence[dict[str, Any]], *, mixed: bool = False) -> None:
    """Raises ValueError where one table would have results of unlike machines, unless that is allowed (`mixed`)."""
    kinds = machines(results)
    if len(kinds) > 1 and not mixed:
        examples = "; ".join(f"{r['name']} on {kind}" for kind, r in kinds.items())
        raise ValueError(f"results of {len(kinds)} kinds of machine in one table ({examples}): --mixed allows it")
