"""Where the other projects' weights and logits lie: beside the checkout, and not on every machine."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def parity() -> Path:
    folder = Path(__file__).parents[2].parent / "shared" / "data" / "parity"
    if not folder.is_dir():
        pytest.skip(f"no weights of other projects at {folder}")
    return folder
