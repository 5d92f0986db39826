"""`retentive bench NAME`: measure something on this machine; a table and, with --json, a file and a picture beside it.

One verb serves all benches, those of other tables of names too, since all have one shape (`retentive.bench`).
"""

import ast
import importlib
import shlex
import sys
from collections.abc import Mapping
from dataclasses import make_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import tyro

from retentive.bench import BENCHES
from retentive.bench.run import keep
from retentive.cli.parsing import parse
from retentive.cli.progress import say
from retentive.files import check_places


def main(argv: list[str], benches: Mapping[str, str] = BENCHES, program: str = "retentive bench") -> None:
    """`retentive bench ARGV`, or another program with other benches."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {program} NAME [OPTIONS]    ({program} NAME --help shows the options)\n")
        for name, module in benches.items():
            print(f"  {name:<12} {about(module)}")
        return
    name = argv[0]
    if name not in benches:
        raise ValueError(f"unknown bench {name!r}, expected one of {', '.join(benches)}")
    bench: Any = importlib.import_module(benches[name])
    command = parse(command_of(bench), f"{program} {name}", argv[1:])
    if command.json:  # known before hours of measuring
        check_places(command.json, command.json.with_suffix(".png") if bench.PICTURE else None)
    from retentive.train import Interrupted  # slow to import, and only here

    try:
        result = bench.measure(command, say)
    except Interrupted as stop:  # of a bench that trains its models
        print("stopped; what was trained is saved, and the same command goes on", file=sys.stderr)
        sys.exit(128 + stop.number)
    print(bench.table(result))
    if command.json:
        keep(command.json, bench, result, shlex.join([*program.split(), *argv]))
    if not result.get("ok", True):  # only after the result was kept, which shows what is wrong
        raise ValueError(f"the {name} found what must not be: see above")


def about(module: str) -> str:
    """First line of the docstring of the module's `Options`; the module, slow to import, is only read."""
    spec = find_spec(module)
    assert spec and spec.origin
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    (options,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Options")
    return (ast.get_docstring(options) or "").partition("\n")[0]


def command_of(bench: Any) -> Any:
    """The bench's `Options` with one more field, `json`."""
    text = "File for the result; a picture is written beside it." if bench.PICTURE else "File for the result."
    json = ("json", Annotated[Path | None, tyro.conf.arg(help=text)], None)
    return make_dataclass(
        "Command", [json], bases=(bench.Options,), frozen=True, namespace={"__doc__": bench.Options.__doc__}
    )
