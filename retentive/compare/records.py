"""The record of a run of a comparison: OUT/NAME/compared.json, written last, so that it says that the run is done."""

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
"""The file in a run's directory with its result."""
MACHINE = ("cpu", "threads", "gpu")
"""What of the hardware must be the same for all runs of one table, since speeds and memory are compared."""


DEFAULTS = asdict(TrainConfig())
"""Of the options of training."""


class Run(NamedTuple):
    """One training run of a comparison."""

    variant: str
    size: str
    seed: int
    lr: float | None
    """None: the best of several rates, which is not known yet."""

    @property
    def name(self) -> str:
        """The name of its directory, once its rate is known."""
        lr = "?" if self.lr is None else f"{self.lr:g}"
        return f"{self.variant}_{self.size}_lr{lr}_seed{self.seed}"


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


def check_done(file: Path, wanted: dict[str, Any], config: Config) -> None:
    """Raises ValueError where the run that left this record had other options or another model than are wanted."""
    record = read_record(file)
    about = record["about"]
    # the options of training beside the others, by their names; a record from before there was one has its default
    had, want = DEFAULTS | about | about["train"], wanted | wanted["train"]
    for name in want:
        if name != "train" and had.get(name) != want[name]:
            raise ValueError(
                f"{file.parent}: of another comparison ({name} {had.get(name)}, now {want[name]}); choose another `out`"
            )
    check_model(file.parent, record.get("config", {}), config)  # records from before 27 November 2026 have none


def check_model(folder: Path, found: dict[str, Any], config: Config) -> None:
    """Raises ValueError where a run's model is not what the variant stands for now, apart from its vocabulary.

    Args:
        found: its config as JSON has it, or the flat fields that older records have.
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
    """The config as one set of fields, as old records have it, where that can be: a field that differs has a name."""
    own: Any = config
    described = None if config.library else version_1(own)
    return config.written() if described is None else described[1]


def adopt(file: Path, out: Path, names: Collection[str]) -> None:
    """Puts the records of the runs `names` that a file of `compare --json` holds into `out`, where there are none yet.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no result of a comparison.
    """
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        found = {record["name"]: record for record in result["runs"]}
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file; name a result of `retentive compare`") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{file} is no result of a comparison ({type(error).__name__}: {error})") from None
    for name in set(names) & set(found):
        if not (out / name).exists():
            make_folder(out / name)
            write_json(out / name / RECORD, found[name])


def machines(results: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """One result of each kind of machine, by what tells the kinds apart."""
    return {", ".join(f"{key} {r['hardware'][key]}" for key in MACHINE): r for r in results}


def check_hardware(results: Sequence[dict[str, Any]], *, mixed: bool = False) -> None:
    """Raises ValueError where one table would have results of unlike machines, unless that is allowed (`mixed`)."""
    kinds = machines(results)
    if len(kinds) > 1 and not mixed:
        examples = "; ".join(f"{r['name']} on {kind}" for kind, r in kinds.items())
        raise ValueError(f"results of {len(kinds)} kinds of machine in one table ({examples}); `mixed=True` allows it")
