"""mkdocs hooks: add the pages outside docs/, resolve links between files, insert diagrams and the modules of each room.

Pages also read well on disk and on a site that shows repositories: links are relative to the file, a diagram is a
linked SVG. On the site, a link into the code leads to the repository that pyproject.toml names. While it names none,
such a link becomes its text. Diagrams stand in the page itself, so that they take its light or dark colours.
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
LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:)([^)\s#]+)(#[^)\s]*)?\)")
DIAGRAM = re.compile(r"!\[[^\]]*\]\((diagrams/[\w-]+\.svg)\)")
MODULES = re.compile(r"<!-- modules of ([\w.]+): ([\w. ]*)-->")
_named = re.search(r'^Repository = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
REPOSITORY = _named[1] if _named else None
"""Address of the source repository, set in pyproject.toml alone; None while it is not published."""


def on_config(config):
    """Add the repository to the navigation."""
    if REPOSITORY:
        config.nav.append({"Source": REPOSITORY})
    return config


def on_files(files, config):
    """Add results/ (pages, pictures, data and a page of all tables), CHANGELOG.md and CONTRIBUTING.md."""
    outside = {path: f"results/{path.name}" for kind in ("md", "png", "json") for path in RESULTS.glob(f"*.{kind}")}
    outside[RESULTS / "README.md"] = "results/files.md"
    outside |= {ROOT / name: name for name in ("CHANGELOG.md", "CONTRIBUTING.md")}
    for path, uri in outside.items():
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    files.append(File.generated(config, "results/tables.md", content=figures.tables()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links between files into links between pages or into the repository; insert diagrams and modules."""
    pages = {file.abs_src_path: file.src_uri for file in files}
    here = Path(page.file.src_uri).parent
    folder = Path(page.file.abs_src_path).parent if page.file.abs_src_path else ROOT / here

    def lead(match):
        text, anchor = match[1], match[3] or ""
        path = (folder / match[2]).resolve()
        if uri := pages.get(str(path)):
            return f"[{text}]({os.path.relpath(uri, here)}{anchor})"
        if not path.exists() or path.is_relative_to(DOCS):
            return match[0]  # the strict build names it
        view, inside = "tree" if path.is_dir() else "blob", path.relative_to(ROOT).as_posix()
        if REPOSITORY:
            return f"[{text}]({REPOSITORY}/{view}/main/{inside}{anchor})"
        return f"`{text}`" if "/" in text and "`" not in text else text

    markdown = LINK.sub(lead, markdown)
    markdown = DIAGRAM.sub(lambda match: f"<div>{(DOCS / match[1]).read_text(encoding='utf-8')}</div>", markdown)
    return MODULES.sub(lambda match: modules(match[1], match[2].split()), markdown)


def modules(room: str, first: list[str]) -> str:
    """Return a heading and the documentation of each module of a room: `first` in order, then the others by name."""
    folder = ROOT.joinpath(*room.split("."))
    names = {path.stem for path in folder.glob("[!_]*.py")} | {
        path.parent.name for path in folder.glob("*/__init__.py")
    }
    order = [name for name in first if name in names] + sorted(names - set(first))
    return "\n\n".join(f"## {room}.{name} {{ #{room}.{name} }}\n\n::: {room}.{name}" for name in order)
