"""Folders of other projects' weights and logits: small ones here, and larger ones beside the checkout if present."""

from pathlib import Path

import pytest

FOLDERS = {
    "small": Path(__file__).parent / "fixtures",
    "large": Path(__file__).parents[2].parent / "shared" / "data" / "parity",
}


@pytest.fixture(params=FOLDERS, scope="session")
def parity(request) -> Path:
    folder = FOLDERS[request.param]
    if request.param == "large" and not folder.is_dir():
        pytest.skip(f"no larger weights of other projects at {folder}")
    return folder
