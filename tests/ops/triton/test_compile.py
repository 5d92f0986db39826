"""Every entry of the tile table compiles for its GPUs within its limits. Needs no GPU."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from retentive.ops.triton.tiles import TABLE
from tests.ops.triton import compile_report

pytestmark = pytest.mark.slow

KERNELS = 24  # per entry: two training steps of 6 and 7 on large states, one of 7 on a small one, 2 + 2 in short chunks
STEPS = 2
RESULTS = Path(__file__).parents[3] / "results/triton-compile_sm80-to-sm100_202611.md"
# bytes: tiles were chosen with Triton 3.9, where all fit; 3.5 spills one register in four kernels
SPILLS = 0 if tuple(map(int, version("triton").split(".")[:2])) >= (3, 9) else 4


@pytest.fixture(scope="session")
def reports(once, tmp_path_factory) -> list[dict]:
    """Output of compile_report.py, from a process that compiles instead of interpreting.

    It takes minutes, so the committed result is used if it was made from these kernels by this version of Triton.
    """
    if RESULTS.is_file() and f"Sources and version: {compile_report.key()}\n" in RESULTS.read_text(encoding="utf-8"):
        return rows_of(RESULTS.read_text(encoding="utf-8"))

    def make(file: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
        command = [sys.executable, compile_report.__file__, "--markdown"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        file.write_text(done.stdout, encoding="utf-8")

    return rows_of(once("compile_report.md", make).read_text(encoding="utf-8"))


def rows_of(page: str) -> list[dict]:
    names, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if "|" in line)
    rows = [dict(zip(names, line, strict=True)) for line in lines]
    return [{name: int(x) if x.isdigit() else x for name, x in row.items()} for row in rows]


@pytest.mark.timeout(1800)  # the first one waits until everything is compiled
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
