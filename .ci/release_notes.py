"""Prints the section of CHANGELOG.md for a version; with --version the newest version there.

python .ci/release_notes.py 0.5.0
"""

import re
import sys
from pathlib import Path

CHANGELOG = Path(__file__).parents[1] / "CHANGELOG.md"
HEADING = re.compile(r"^## (\d+\.\d+\.\d+) \((\d{4}-\d{2}-\d{2})\)\n", re.MULTILINE)


def sections(text: str) -> dict[str, str]:
    """The notes of each version, the newest first."""
    parts = HEADING.split(text)[1:]
    return {version: notes.strip() for version, notes in zip(parts[::3], parts[2::3], strict=True)}


def main(asked: str) -> None:
    """Print what is asked for; exit with a line for a version that is not there."""
    found = sections(CHANGELOG.read_text(encoding="utf-8"))
    if asked == "--version":
        print(next(iter(found)))
    elif asked in found:
        print(found[asked])
    else:
        sys.exit(f"CHANGELOG.md has no version {asked}; it has {', '.join(found)}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "--version")
