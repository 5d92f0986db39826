"""The page: files of results in, one self-contained HTML file out. No number is computed here, and none is left out.

Each file is shown by itself, with the name of its machine, or of several where a comparison was allowed to mix them.
"""

import base64
import html
import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from retentive.report.sections import SECTIONS, Section, table


class File(NamedTuple):
    path: Path
    kind: str
    """The command that made it: "compare", "bench decode", …"""
    result: dict[str, Any]
    table: str | None
    """What that command shows of it, Markdown; None where it is none of ours."""


def build(folder: Path) -> str:
    """The page of all results in a folder.

    Raises:
        FileNotFoundError: no folder, or no result in it.
        ValueError: a file that is damaged, or that no command of this package made.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: name the one with the files of results")
    files = [read(path) for path in sorted(folder.glob("*.json"))]
    if not files:
        raise FileNotFoundError(f"{folder} holds no result: retentive bench, eval and compare write them with --json")
    return page(files)


def read(path: Path) -> File:
    """A file of results, and the command that made it."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        command, _ = result.get("command", ""), machine(result)
        words = shlex.split(command)[1:] or ["?"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no file of results ({type(error).__name__}: {error}): take it away") from None
    kind = " ".join(words[:2]) if words[0] == "bench" else words[0]
    try:
        shown = table(kind, result)
        any(section.takes(kind, result) for section in SECTIONS)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(
            f"{path} does not hold what {command[:40]!r} writes ({type(error).__name__} {error}): measure it again"
        ) from None
    return File(path, kind, result, shown)


def page(files: Sequence[File]) -> str:
    """The HTML."""
    taken: set[Path] = set()
    parts = []
    for section in SECTIONS:
        mine = [file for file in files if section.takes(file.kind, file.result)]
        taken |= {file.path for file in mine}
        parts.append(_section(section, mine))
    rest = [file for file in files if file.path not in taken]
    contents = "".join(f'<li><a href="#{_anchor(s.title)}">{html.escape(s.title)}</a></li>' for s in SECTIONS)
    machines = sorted({name for file in files for name in machine(file.result).split("; ")})
    hardware = "".join(f"<li>{html.escape(name)}</li>" for name in machines)
    others = "".join(
        f"<li><code>{html.escape(file.path.name)}</code>: {html.escape(str(file.result.get('what', file.kind)))}, "
        f"{html.escape(machine(file.result))}</li>"
        for file in rest
    )
    return TEMPLATE.format(
        style=STYLE,
        contents=contents,
        hardware=hardware,
        sections="".join(parts),
        others=f"<h2>Other files</h2><ul>{others}</ul>" if others else "",
    )


def machine(result: dict[str, Any]) -> str:
    """Hardware and versions of a result, in a line; of each kind of machine where there are several."""
    lines = []
    for h in result.get("machines", [result["hardware"]]):
        gpu = "" if h.get("gpu", "none") == "none" else f", {h['gpu']}"
        lines.append(f"{h['cpu']}, {h['threads']} threads{gpu}, torch {h['torch']}, Python {h['python']}")
    return "; ".join(lines)


def _section(section: Section, files: list[File]) -> str:
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
    """One result: what and where, its picture, its table, its command."""
    picture = file.path.with_suffix(".png")
    image = ""
    if picture.is_file():
        data = base64.b64encode(picture.read_bytes()).decode()
        image = f'<img alt="{html.escape(picture.stem)}" src="data:image/png;base64,{data}">'
    name = file.path.stem.split("_")[0]
    mixed = "<strong>Several machines</strong>: " if len(file.result.get("machines", [])) > 1 else ""
    where = mixed + html.escape(machine(file.result))
    return (
        f'<article><h3>Measured: {html.escape(name)}</h3><p class="where">{where}<br>'
        f"<code>{html.escape(file.result.get('command', ''))}</code></p>{image}"
        f"<div>{to_html(file.table or '')}</div></article>"
    )


def to_html(markdown: str) -> str:
    """Tables, lists and paragraphs of Markdown; nothing else of it is used in results."""
    return "".join(_blocks([block.splitlines() for block in markdown.strip().split("\n\n") if block.strip()]))


def _blocks(blocks: list[list[str]]) -> Iterator[str]:
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


STYLE = """
:root { color-scheme: light dark; --line: light-dark(#d5d5d0, #44443f); --soft: light-dark(#f6f5f1, #24241f);
  --text: light-dark(#1d1d1a, #e8e7e0); --ground: light-dark(#fffffc, #191916); --quiet: light-dark(#5d5d57, #a4a39a) }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--text); background: var(--ground); margin: 0 auto;
  max-width: 62rem; padding: 2rem 1.2rem 5rem }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem } h2 { margin: 3.2rem 0 .4rem; font-size: 1.35rem }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem } p { margin: .5rem 0 } a { color: inherit }
.question { font-size: 1.08rem } .where, .differs { color: var(--quiet); font-size: .9rem }
.paper { background: var(--soft); border-left: 3px solid var(--line); padding: .2rem 1rem .8rem; margin: 1rem 0 }
code { font-size: .82rem; overflow-wrap: anywhere } img { max-width: 100%; background: white; margin: .6rem 0 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem; margin: .7rem 0 }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid var(--line) }
td { white-space: nowrap } th { vertical-align: bottom } th:first-child, td:first-child { text-align: left }
ul.contents { columns: 2; padding-left: 1.2rem }
"""

TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Retentive Networks: what was measured</title><style>{style}</style></head><body>
<h1>Retentive Networks: what was measured</h1>
<p>The questions of the paper (arXiv 2307.08621), asked again with the same tokens and the same budget on both sides.
Each table names its machine and its command; nothing is estimated.</p>
<ul class="contents">{contents}</ul>
<h3>Machines</h3><ul>{hardware}</ul>
{sections}{others}
</body></html>
"""
