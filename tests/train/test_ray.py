"""Training in workers of Ray Train equals training in one process, and restarts if a worker dies."""

import json
import os
import signal

import pytest

pytest.importorskip("ray.train", reason="Ray is not installed: pip install 'retentive[ray]'")

from retentive.train import TrainRun
from retentive.train.checkpoints import folders
from retentive.train.ray import fit

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # its processes import torch, and Ray's other tests may have to end first
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]
SMALL = {"dim": 32, "layers": 2, "heads": 2}


def losses(folder) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_workers_train_as_one_process_does_and_are_started_again(small_ray, packed, tmp_path, monkeypatch):
    """One of two dies before batch 5, once: the other ends with it, and both resume from the checkpoint of step 3."""
    how = dict(size="1m", set=SMALL, batch=4, length=32, steps=6, precision="fp32", device="cpu", eval_every=0)
    how |= dict(save_every=3, resume=True)
    alone = TrainRun.of(packed, tmp_path / "alone", **how).run(quiet=True)
    died = tmp_path / "died"

    class Dying(TrainRun):
        def batches(self, data, cluster):
            read = super().batches(data, cluster)

            class Once:
                length = read.length

                def __getitem__(self, index):
                    if index == 4 and cluster.rank == 1 and not died.exists():
                        died.touch()
                        os.kill(os.getpid(), signal.SIGKILL)
                    return read[index]

            return Once()

    monkeypatch.chdir(tmp_path)
    assert fit(Dying.of(packed, "shared", **how, dp_shard=2), 2, cpus=0.5, restarts=1) == tmp_path / "shared"
    assert died.exists() and len(folders(tmp_path / "shared")) == 2
    want, have = losses(alone), losses(tmp_path / "shared")
    assert max(abs(a - b) for a, b in zip(want, have, strict=True)) < 1e-6  # float32's rounding


def test_restarts_need_a_run_that_resumes(packed, tmp_path, refuses):
    with refuses("make it with `resume=True`"):
        fit(TrainRun.of(packed, tmp_path / "run", size="1m"), 2, restarts=1)
    assert not (tmp_path / "run").exists()
