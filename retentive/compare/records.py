"""Record of a run of a comparison: OUT/NAME/compared.json. It is written last, and so marks the run as done."""

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from retentive.files import make_folder, write_json
from retentive.models import Config, ModelConfig
from retentive.models.version_1 import version_1
from retentive.train.config import TrainConfig

RECORD = "compared.json"
"""File in the run directory with the result."""
MACHINE = ("cpu", "threads", "gpu")
"""Hardware that all runs of one table must share, since the table compares speed and memory."""


DEFAULTS = asdict(TrainConfig())
"""Default options of training."""


class Run(NamedTuple):
    """One training run of a comparison."""

    variant: str
    size: str
    seed: int
    lr: float | None
    """Peak learning rate; None for the best of several, which is not known yet."""

    @property
    def name(self) -> str:
        """Name of the run directory, once the learning rate is known."""
        lr = "?" if self.lr is None else f"{self.lr:g}"
        return f"{self.variant}_{self.size}_lr{lr}_seed{self.seed}"


def read_record(file: Path) -> dict[str, Any]:
    """Reads a record.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        _ = found["name"], found["about"]["train"], [found["hardware"][key] for key in MACHINE]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is damaged ({type(error).__name__}: {error}): delete it to score the run again"
        ) from None
    return found


def records(out: Path, runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Returns the records of the finished runs."""
    files = [out / run.name / RECORD for run in runs]
    return [read_record(file) for file in files if file.is_file()]


def check_done(file: Path, wanted: dict[str, Any], config: Config) -> None:
    """Raises ValueError if the run of this record had other options or another model."""
    record = read_record(file)
    about = record["about"]
    # options of training beside the others, by name; older records have the defaults of newer options
    had, want = DEFAULTS | about | about["train"], wanted | wanted["train"]
    for name in want:
        if name != "train" and had.get(name) != want[name]:
            raise ValueError(
                f"{file.parent}: of another comparison ({name} {had.get(name)}, now {want[name]}); choose another `out`"
            )
    check_model(file.parent, record.get("config", {}), config)  # records before 27 November 2026 have no config


def check_model(folder: Path, found: dict[str, Any], config: Config) -> None:
    """Raises ValueError if a run's model differs from the variant of today, apart from the vocabulary size.

    Args:
        found: the config as JSON, or the flat fields of older records.
    """
    wanted = json.loads(json.dumps(_fields(config)))
    had = _fields(ModelConfig.read(found)) if "blocks" in found else found
    for name, value in json.loads(json.dumps(had)).items():
        if name != "vocab_size" and wanted.get(name) != value:
            raise ValueError(
                f"{folder}: of another comparison, its model has {name}={value!r}, this variant "
                f"{wanted.get(name)!r}; choose another `out`, or another name for the variant"
            )


def _fields(config: Config) -> dict[str, Any]:
    """Returns the config as flat fields, as in old records, if possible, so that errors can name a field."""
    own: Any = config
    described = None if config.library else version_1(own)
    return config.written() if described is None else described[1]


def adopt(file: Path, out: Path, names: Collection[str]) -> tuple[int, int]:
    """Copies the records of the runs `names` from a result file into `out`, unless they exist there.

    Returns the number of runs in the file that have one of these names, and of all its runs.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a result of a comparison.
    """
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        found = {record["name"]: record for record in result["runs"]}
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file; name a result of `retentive compare`") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{file} is not a result of a comparison ({type(error).__name__}: {error})") from None
    wanted = set(names) & set(found)
    for name in wanted:
        if not (out / name).exists():
            make_folder(out / name)
            write_json(out / name / RECORD, found[name])
    return len(wanted), len(found)


def machines(results: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns one result of each kind of machine, by the hardware in MACHINE."""
    return {", ".join(f"{key} {r['hardware'][key]}" for key in MACHINE): r for r in results}


def check_hardware(results: Sequence[dict[str, Any]], *, mixed: bool = False) -> None:
    """Raises ValueError if one table would mix results of different machines, unless `mixed`."""
    kinds = machines(results)
    if len(kinds) > 1 and not mixed:
        examples = "; ".join(f"{r['name']} on {kind}" for kind, r in kinds.items())
        raise ValueError(f"results of {len(kinds)} kinds of machine in one table ({examples}); `mixed=True` allows it")
