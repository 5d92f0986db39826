"""CHANGELOG.md by release: the newest one is the package's version, and the release workflow can read each."""

import importlib.util
from pathlib import Path

import retentive

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("release_notes", ROOT / ".ci" / "release_notes.py")
assert spec is not None and spec.loader is not None
release_notes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(release_notes)


def test_the_newest_release_is_the_packages_version():
    found = release_notes.sections((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    assert next(iter(found)) == retentive.__version__
    assert f"version: {retentive.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    numbers = [tuple(map(int, version.split("."))) for version in found]
    assert numbers == sorted(numbers, reverse=True) and all("### " in notes for notes in found.values())
