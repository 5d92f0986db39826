"""`retentive report`: all results of a folder as one page."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.filesize import decimal

from retentive.cli.parsing import parse
from retentive.files import check_place, write_text


@dataclass(frozen=True)
class ReportCommand:
    """One self-contained HTML page of all results in a folder, the paper's tables beside them."""

    results: Path = Path("results")
    """Folder of the JSON files that bench, eval and compare write, with their pictures."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
    """The page."""


def main(argv: list[str]) -> None:
    """`retentive report ARGV`."""
    from retentive.report import build  # late: --help comes at once

    command = parse(ReportCommand, "retentive report", argv)
    if command.out.is_dir():
        raise IsADirectoryError(
            f"{command.out} is a folder: name the file of the page, as -o {command.out}/report.html"
        )
    check_place(command.out)
    page = build(command.results)
    write_text(command.out, page)
    print(f"{command.out}  {decimal(len(page))}")
