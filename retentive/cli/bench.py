"""`retentive bench NAME`: measure something on this machine; a table and, with --json, a file and a picture beside it.

One verb serves all benches, those of other tables of names too, since all have one shape (`retentive.bench`).
"""

import importlib
import shlex
import sys
from collections.abc import Mapping
from dataclasses import make_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from retentive.bench import BENCHES
from retentive.cli.progress import say
from retentive.files import check_places, write_json, write_together


def main(argv: list[str], benches: Mapping[str, str] = BENCHES, program: str = "retentive bench") -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {program} NAME [OPTIONS]\n")
        for name, module in benches.items():
            print(f"  {name:<12} {importlib.import_module(module).Options.__doc__}")
        return
    name = argv[0]
    if name not in benches:
        raise ValueError(f"unknown bench {name!r}, expected one of {', '.join(benches)}")
    bench: Any = importlib.import_module(benches[name])
    command = tyro.cli(command_of(bench), prog=f"{program} {name}", args=argv[1:])
    if command.json:  # known before hours of measuring
        check_places(command.json, command.json.with_suffix(".png") if bench.PICTURE else None)
    from retentive.train import Interrupted  # here, since `retentive bench --help` needs no torch

    try:
        result = bench.measure(command, say)
    except Interrupted as stop:  # of a bench that trains its models
        print("stopped; what was trained is saved, and the same command goes on", file=sys.stderr)
        sys.exit(128 + stop.number)
    table = bench.table(result)
    print(table)
    if command.json:
        # the table too, so that a report shows it without the code that measured
        result = {"command": shlex.join([*program.split(), *argv]), **result, "table": table}
        keep(command.json, bench, command, result)
    if not result.get("ok", True):  # only after the result was kept, which shows what is wrong
        raise ValueError(f"the {name} found what must not be: see above")


def command_of(bench: Any) -> Any:
    """The bench's `Options` with a field `json` more: writing files is the verb's, benches return dictionaries."""
    text = "File for the result; a picture is put beside it." if bench.PICTURE else "File for the result."
    json = ("json", Annotated[Path | None, tyro.conf.arg(help=text)], None)
    return make_dataclass(
        "Command", [json], bases=(bench.Options,), frozen=True, namespace={"__doc__": bench.Options.__doc__}
    )


def keep(path: Path, bench: Any, options: Any, result: dict[str, Any]) -> None:
    """Writes a result and its picture, each whole or not at all; the result first, since plotting may fail."""
    write_json(path, result)
    if bench.PICTURE is None:
        return
    machine = result["hardware"]
    where = f"{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    if result.get("device", "cpu") != "cpu":
        where = machine["gpu"]
    title = f"{bench.PICTURE.format(**vars(options))} on {where}"
    write_together({path.with_suffix(".png"): lambda partial: bench.plot(result, partial, title=title)})
