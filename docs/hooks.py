"""What mkdocs is told beyond mkdocs.yml: pages from outside docs/, links that lead there, and the modules of each room.

Every page reads as well on the disk, or on a site that shows repositories, as it does here: links are relative to the
file, a diagram is a linked SVG. Here links into the code lead to the repository, and diagrams stand in the page itself,
so that they take its light or dark colours.
"""

import os
import re
import sys
from pathlib import Path

from mkdocs.structure.files import File

sys.path.insert(0, str(Path(__file__).parent))
import figures

ROOT = figures.ROOT
DOCS, RESULTS = ROOT / "docs", ROOT / "results"
LINK = re.compile(r"(\]\()(?!\w+:)([^)\s#]+)")
DIAGRAM = re.compile(r"!\[[^\]]*\]\((diagrams/[\w-]+\.svg)\)")
MODULES = re.compile(r"<!-- modules of ([\w.]+): ([\w. ]*)-->")


def on_files(files, config):
    """Add results/ (its pages, its pictures and, as one more page, its tables), the changelog, how to contribute."""
    outside = {path: f"results/{path.name}" for path in (*RESULTS.glob("*.md"), *RESULTS.glob("*.png"))}
    outside[RESULTS / "README.md"] = "results/files.md"
    outside |= {ROOT / name: name for name in ("CHANGELOG.md", "CONTRIBUTING.md")}
    for path, uri in outside.items():
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    files.append(File.generated(config, "results/tables.md", content=figures.tables()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links between files become links between pages, or into the repository; diagrams and modules are put in."""
    pages = {file.abs_src_path: file.src_uri for file in files}
    here = Path(page.file.src_uri).parent
    folder = Path(page.file.abs_src_path).parent if page.file.abs_src_path else ROOT / here

    def lead(match):
        path = (folder / match[2]).resolve()
        if uri := pages.get(str(path)):
            return match[1] + os.path.relpath(uri, here)
        if not path.exists() or path.is_relative_to(DOCS):
            return match[0]  # the strict build names it
        return f"{match[1]}{config.extra['repository']}/blob/main/{path.relative_to(ROOT).as_posix()}"

    markdown = LINK.sub(lead, markdown)
    markdown = DIAGRAM.sub(lambda match: f"<div>{(DOCS / match[1]).read_text(encoding='utf-8')}</div>", markdown)
    return MODULES.sub(lambda match: modules(match[1], match[2].split()), markdown)


def modules(room: str, first: list[str]) -> str:
    """A heading and the documentation of each module of a room, those named `first` first, the others by name."""
    folder = ROOT.joinpath(*room.split("."))
    names = {path.stem for path in folder.glob("[!_]*.py")} | {
        path.parent.name for path in folder.glob("*/__init__.py")
    }
    order = [name for name in first if name in names] + sorted(names - set(first))
    return "\n\n".join(f"## {room}.{name} {{ #{room}.{name} }}\n\n::: {room}.{name}" for name in order)
