"""Report page: files of results in, one self-contained HTML file out. Computes no number and leaves out no file.

Each file is shown on its own, with its machine, or its machines if a comparison was allowed to mix them.
"""

import base64
import html
import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from retentive.report.sections import SECTIONS, Section, table
from retentive.tables import counted


class File(NamedTuple):
    """A file of results."""

    path: Path
    kind: str
    """Command that wrote it: "compare", "bench decode", …"""
    result: dict[str, Any]
    table: str | None
    """Table that the command prints, in Markdown; None if it prints none."""


def build(folder: Path) -> str:
    """Returns the page of all results in a folder.

    Raises:
        FileNotFoundError: the folder does not exist, or holds no result.
        ValueError: a file is damaged, or was written by no command of this package.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: name the one with the files of results")
    # read all before rendering: a damaged file is reported, and no page is written without it
    files = [read(path) for path in sorted(folder.glob("*.json"))]
    if not files:
        verbs = "`retentive bench`, `retentive eval` and `retentive compare`"
        raise FileNotFoundError(f"{folder}: no result; {verbs} write them with `json=FILE`")
    return page(files)


def read(path: Path) -> File:
    """Reads a file of results, and determines the command that wrote it.

    Raises:
        ValueError: it is damaged, or its content is not what its command writes.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        command, _ = result.get("command", ""), machine(result)
        kind = kind_of(command)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no file of results ({type(error).__name__}: {error}): take it away") from None
    try:
        shown = table(kind, result)
        any(section.takes(kind, result) for section in SECTIONS)  # raises here, where the file's name is known
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} does not hold what {command[:40]!r} writes ({type(error).__name__} {error}): measure it again"
        ) from None
    return File(path, kind, result, shown)


def kind_of(command: str) -> str:
    """The verb of a command line, and for a bench its name: "compare", "bench decode"; "?" without a verb.

    Raises:
        ValueError: a quotation that is not closed.
    """
    words = shlex.split(command.replace("python -m benchmarks", "retentive bench", 1))[1:] or ["?"]
    return " ".join(words[:2]) if words[0] == "bench" else words[0]


def page(files: Sequence[File]) -> str:
    """Returns the page as HTML with embedded pictures; files of no section are listed at its end."""
    taken: set[Path] = set()
    parts = []
    for section in SECTIONS:
        mine = [file for file in files if section.takes(file.kind, file.result)]
        taken |= {file.path for file in mine}
        parts.append(_section(section, mine))  # also without files, to show what is missing
    rest = [file for file in files if file.path not in taken]
    contents = "".join(f'<li><a href="#{_anchor(s.title)}">{html.escape(s.title)}</a></li>' for s in SECTIONS)
    # one line per machine, though many files share one
    machines = sorted({name for file in files for name in machine(file.result).split("; ")})
    hardware = "".join(f"<li>{html.escape(name)}</li>" for name in machines)
    others = "".join(
        f"<li><code>{html.escape(file.path.name)}</code>: {html.escape(str(file.result.get('what', file.kind)))}, "
        f"{html.escape(machine(file.result))}</li>"
        for file in rest
    )
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        contents=contents,
        hardware=hardware,
        sections="".join(parts),
        others=f"<h2>Other files</h2><ul>{others}</ul>" if others else "",
    )


def machine(result: dict[str, Any]) -> str:
    """Describes hardware and versions of a result in one line, several machines separated by "; "."""
    lines = []
    # only comparisons have several machines; other results name theirs as "hardware"
    for h in result.get("machines", [result["hardware"]]):
        gpu = "" if h.get("gpu", "none") == "none" else f", {h['gpu']}"
        lines.append(f"{h['cpu']}, {counted(h['threads'], 'thread')}{gpu}, torch {h['torch']}, Python {h['python']}")
    return "; ".join(lines)


def _section(section: Section, files: list[File]) -> str:
    """Renders one question: the paper's numbers, our files, and why the numbers differ; or that there are none."""
    blocks = [f'<section id="{_anchor(section.title)}"><h2>{html.escape(section.title)}</h2>']
    blocks.append(f'<p class="question">{html.escape(section.question)}</p>')
    if section.paper:
        blocks.append(f'<div class="paper"><h3>The paper, and others</h3>{to_html(section.paper)}</div>')
    if not files:
        blocks.append("<p><strong>Not measured.</strong></p>")
    for file in files:
        blocks.append(_file(file))
    if files:
        blocks.append(f'<p class="differs">{html.escape(section.differs)}</p>')
    return "".join(blocks) + "</section>"


def _file(file: File) -> str:
    """Renders one result: what was measured, on which machine, its command, picture and table."""
    picture = file.path.with_suffix(".png")
    image = ""
    if picture.is_file():
        # embedded, so that the page is a single file
        data = base64.b64encode(picture.read_bytes()).decode()
        image = f'<img alt="{html.escape(picture.stem)}" src="data:image/png;base64,{data}">'
    name = file.path.stem.split("_")[0]  # of NAME_MACHINE_MONTH.json
    mixed = "<strong>Several machines</strong>: " if len(file.result.get("machines", [])) > 1 else ""
    where = mixed + html.escape(machine(file.result))
    return (
        f'<article><h3>Measured: {html.escape(name)}</h3><p class="where">{where}<br>'
        f"<code>{html.escape(file.result.get('command', ''))}</code></p>{image}"
        f"<div>{to_html(file.table or '')}</div></article>"
    )


def to_html(markdown: str) -> str:
    """Converts Markdown's tables, lists and paragraphs to HTML; results use nothing else."""
    return "".join(_blocks([block.splitlines() for block in markdown.strip().split("\n\n") if block.strip()]))


def _blocks(blocks: list[list[str]]) -> Iterator[str]:
    """Yields HTML of each block of lines: a table (its second line is the rule), a list, or a paragraph."""
    for lines in blocks:
        if lines[0].startswith("|"):
            head, _, *rows = ([cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines)
            yield '<div class="wide"><table><thead>' + _row("th", head) + "</thead><tbody>"
            yield "".join(_row("td", row) for row in rows) + "</tbody></table></div>"
        elif all(line.startswith(("- ", "  ")) for line in lines):
            yield "<ul>" + "".join(f"<li>{html.escape(line[2:])}</li>" for line in lines) + "</ul>"
        else:
            yield f"<p>{html.escape(' '.join(lines))}</p>"


def _row(tag: str, cells: list[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _anchor(title: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in title.lower())
