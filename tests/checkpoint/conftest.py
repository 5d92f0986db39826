"""Where the other projects' weights and logits lie: small ones here, on some machines larger beside the checkout."""

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
