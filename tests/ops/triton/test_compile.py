"""Every entry of the tile table compiles for its GPUs, and takes what it was chosen to take. No GPU is needed."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from retentive.files import write_text
from retentive.ops import triton as triton_room
from retentive.ops.compiler import cache_folder, short_hash
from retentive.ops.triton.tiles import TABLE

pytestmark = pytest.mark.slow

KERNELS = (
    24  # of an entry: two training steps of 6 and 7 on large states, one of 7 on a small one, 2 + 2 in short chunks
)
STEPS = 2
# bytes: the tiles were chosen with Triton 3.9, where all fit; 3.5 leaves one register over in four kernels
SPILLS = 0 if tuple(map(int, version("triton").split(".")[:2])) >= (3, 9) else 4


@pytest.fixture(scope="session")
def reports(once, tmp_path_factory) -> list[dict]:
    """What compile_report.py says, from a process that compiles and does not interpret.

    It takes minutes: what it said is kept with the user's compiled kernels, for the same sources and the same Triton.
    """
    room = Path(triton_room.__file__).parent
    sources = [
        *sorted(room.rglob("*.py")),
        *sorted(room.parent.glob("*.py")),
        *sorted(Path(__file__).parent.glob("*.py")),
    ]
    versions = f"triton {version('triton')}, torch {version('torch')}, python {sys.version}"
    key = short_hash(versions.encode() + b"".join(file.read_bytes() for file in sources))
    kept = cache_folder() / f"compile-report-{key}.json"
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))

    def make(file: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
        command = [sys.executable, Path(__file__).with_name("compile_report.py")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        file.write_text(done.stdout, encoding="utf-8")

    found = once("compile_report.json", make).read_text(encoding="utf-8")
    kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_text(kept, found)
    return json.loads(found)


@pytest.mark.timeout(1800)  # the first of them waits until everything is compiled
@pytest.mark.parametrize("row", TABLE, ids=lambda row: "sm{}-{}".format(*row))
def test_the_tiles_fit(row, reports):
    arch, kind = row
    found = [one for one in reports if (one["arch"], one["kind"]) == (arch, kind)]
    assert len(found) == KERNELS + (STEPS if kind != "tf32" else 0)
    for one in found:
        assert one["spills"] <= SPILLS, one
        assert one["shared"] <= one["limit"], one
        assert one["registers"] <= 255, one
        on_tensor_cores = kind != "ieee" and one["kernel"] != "token_step"
        assert (one["tensor_core"] > 0) == on_tensor_cores, one
