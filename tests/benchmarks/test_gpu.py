"""`python -m benchmarks gpu`: every step starts, results are kept, failures are told."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import STEPS, Options, failure, measure, table


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("triton") or torch.cuda.is_available(), reason="interprets Triton on a CPU")
@pytest.mark.parametrize("name", STEPS)
def test_every_step_starts(name):
    result = measure(Options(steps=(name,), dry=True))
    assert [row["error"] for row in result["rows"]] == [None], table(result)


def test_all_steps_fit_into_forty_minutes():
    assert sum(step.minutes for step in STEPS.values()) < 40


def test_results_are_kept_and_failures_are_told(tmp_path, monkeypatch):
    def made(command, limit):
        if "decode" in command:
            return "out of memory"
        Path(command[-1]).write_text("{}")
        return None

    monkeypatch.setattr(gpu, "failure", made)
    rows = list(gpu.run(STEPS, tmp_path, True, print))
    assert [row["error"] for row in rows] == [None, None, "out of memory", None]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(row["file"] for row in rows if not row["error"])
    monkeypatch.setattr(gpu, "failure", lambda command, limit: "was run again")
    again = list(gpu.run(STEPS, tmp_path, True, print))
    assert [row["error"] for row in again] == [None, None, "was run again", None]
    assert table({"rows": again}).endswith("1 of 4 failed.")


def test_the_reason_of_a_failure_is_its_last_line():
    script = "import sys; sys.exit('a\\nthe reason')"
    assert failure([sys.executable, "-c", script], 60) == "the reason"
    assert failure([sys.executable, "-c", ""], 60) is None


def test_a_step_that_takes_too_long_is_stopped():
    assert failure([sys.executable, "-c", "import time; time.sleep(60)"], 0.2) == "stopped after 200 ms, its limit"


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu_one_line_says_so(refuses):
    with refuses("no NVIDIA GPU is here: with --dry every step runs in small on the CPU"):
        measure(Options())
    done = subprocess.run([sys.executable, "-m", "benchmarks", "gpu"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "retentive: no NVIDIA GPU is here: with --dry every step runs in small on the CPU\n"
