"""What each run of a comparison leaves: OUT/NAME/compared.json, written last, so that it says that the run is done."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

RECORD = "compared.json"
"""In a run's directory, what came out of it."""
MACHINE = ("cpu", "threads", "gpu")
"""What of the hardware must be the same in one table."""


class Run(NamedTuple):
    """One training run of a plan."""

    variant: str
    size: str
    seed: int
    lr: float

    @property
    def name(self) -> str:
        return f"{self.variant}_{self.size}_lr{self.lr:g}_seed{self.seed}"


def read_record(file: Path) -> dict[str, Any]:
    """What came out of a run.

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
    """What came out of the runs that are done."""
    files = [out / run.name / RECORD for run in runs]
    return [read_record(file) for file in files if file.is_file()]


def check_done(file: Path, wanted: dict[str, Any]) -> None:
    """Raises ValueError where the run that left this record is not the one that is wanted."""
    was = read_record(file)["about"]
    flat = [x | x["train"] for x in (was, wanted)]
    for name in flat[1]:
        if name != "train" and flat[0].get(name) != flat[1][name]:
            raise ValueError(
                f"{file.parent} is of another comparison ({name} {flat[0].get(name)}, now {flat[1][name]}): "
                f"choose another --out"
            )


def machines(results: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By what sets kinds of machine apart, of each kind one of the results."""
    return {", ".join(f"{key} {r['hardware'][key]}" for key in MACHINE): r for r in results}


def check_hardware(results: Sequence[dict[str, Any]], *, mixed: bool = False) -> None:
    """Raises ValueError where results of unlike machines would stand in one table, unless that is wanted (`mixed`)."""
    kinds = machines(results)
    if len(kinds) > 1 and not mixed:
        places = "; ".join(f"{r['name']} on {kind}" for kind, r in kinds.items())
        raise ValueError(f"results of {len(kinds)} kinds of machine in one table ({places}): --mixed allows it")
