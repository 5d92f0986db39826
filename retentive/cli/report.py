"""`retentive report`: build one page from all results in a folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.filesize import decimal

from retentive.cli.parsing import parse
from retentive.files import check_place, write_text


@dataclass(frozen=True)
class ReportCommand:
    """Build one self-contained HTML page from all results in a folder, beside the paper's tables."""

    results: Path = Path("results")
    """Folder of JSON files from bench, eval and compare, with their pictures."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
    """File of the page."""


def main(argv: list[str]) -> None:
    """`retentive report ARGV`."""
    from retentive.report import build  # here, so that --help is fast

    command = parse(ReportCommand, "retentive report", argv)
    if command.out.is_dir():
        raise IsADirectoryError(
            f"{command.out} is a folder: name the file of the page, as -o {command.out}/report.html"
        )
    check_place(command.out)
    page = build(command.results)
    write_text(command.out, page)
    print(f"{command.out}  {decimal(len(page))}")
