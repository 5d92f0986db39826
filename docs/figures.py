"""Writes the numbers of README.md and of pages of docs/ from results/, so that none of them is typed by hand.

    python docs/figures.py            write the blocks anew
    python docs/figures.py --check    exit code 1 and the names of the blocks that are out of date

A block stands between `<!-- figures: NAME -->` and `<!-- end -->`. The function NAME in one of the modules blocks,
blocks_results, blocks_paper and blocks_media makes it.
"""

import re
import sys

import blocks
import blocks_media
import blocks_paper
import blocks_results
from blocks import ROOT

from retentive.report.page import machine, read
from retentive.report.sections import SECTIONS

PAGES = (
    "README.md",
    "docs/index.md",
    "docs/numbers.md",
    "docs/paper.md",
    "docs/native.md",
    "docs/see.md",
    "docs/listen.md",
    "docs/which.md",
)
BLOCKS = {**vars(blocks_results), **vars(blocks_paper), **vars(blocks_media), **vars(blocks)}
BLOCK = re.compile(r"(<!-- figures: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def written(text: str, page: str) -> str:
    """A page with its blocks made anew. Their links become relative to the page.

    Raises:
        KeyError: no function makes a block.
    """
    up = "](" + "../" * page.count("/")

    def made(match: re.Match[str]) -> str:
        block = re.sub(r"\]\((?!\w+:)", up, BLOCKS[match[2].replace("-", "_")]())
        return f"{match[1]}\n{block}\n\n{match[4]}"

    return BLOCK.sub(made, text)


def stale() -> list[str]:
    """`page: block` of every block that differs from results/."""
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        pairs = zip(BLOCK.finditer(text), BLOCK.finditer(written(text, page)), strict=True)
        found += [f"{page}: {old[2]}" for old, new in pairs if old[3] != new[3]]
    return found


def tables() -> str:
    """The page of all tables: every file of results/ as its command prints it, by question, the paper first."""
    found = [read(path) for path in sorted((ROOT / "results").glob("*.json"))]
    parts = ["# All tables\n\nEvery file of `results/`, as the command that made it prints it, sorted by question.\n"]
    for section in SECTIONS:
        parts.append(f"## {section.title}\n\n{section.question}\n")
        if section.paper:
            parts.append(f"**The paper, and others**\n\n{section.paper.strip()}\n")
        for file in (file for file in found if file.table and section.takes(file.kind, file.result)):
            name, picture = file.path.stem.split("_")[0], file.path.with_suffix(".png")
            parts.append(f"### {name}\n\n{machine(file.result)}\n\n    {file.result['command']}\n")
            if picture.exists():
                parts.append(f"![{name}]({picture.name})\n")
            parts.append(file.table.strip() + "\n")
        parts.append(f"*{section.differs}*\n")
    return "\n".join(parts)


def main() -> None:
    if "--check" in sys.argv[1:]:
        if found := stale():
            sys.exit("out of date, run docs/figures.py: " + ", ".join(found))
        return
    for page in PAGES:
        path = ROOT / page
        path.write_text(written(path.read_text(encoding="utf-8"), page), encoding="utf-8")


if __name__ == "__main__":
    main()
