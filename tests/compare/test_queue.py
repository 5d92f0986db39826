"""The queue: a worker per run, finished runs stay finished, a stop at any time, and the memory of each run."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from retentive.checkpoint import save_model
from retentive.compare import queue
from retentive.compare.records import Run
from retentive.models import build, retnet
from retentive.models.version_1 import version_1
from retentive.train import Interrupted
from tests.configs import changed

CONFIG = retnet("1m", vocab_size=2)
FAKE = """
import json, os, signal, sys, time
folder, how = sys.argv[1:]
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
print("begun", flush=True)
if how == "waits":
    while not stopped:
        time.sleep(0.01)
    sys.exit(130)
if how == "fails":
    sys.exit(2)
if how == "late":
    sys.exit(75)
if how == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
from pathlib import Path
Path(folder).mkdir(exist_ok=True)
record = {"name": Path(folder).name, "about": {"train": {"steps": 10}}, "bits_per_byte": 2.5}
record["hardware"] = {"cpu": "a", "threads": 1, "gpu": "none"}
Path(folder, "compared.json").write_text(json.dumps(record))
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """`tasks("done", "waits", …)`: a task each whose worker does that."""
    script = tmp_path / "worker.py"
    script.write_text(FAKE, encoding="utf-8")
    real = queue.subprocess.Popen

    def start(command, **how):
        task = json.loads(command[-1])
        return real([command[0], str(script), *task], **how)

    monkeypatch.setattr(queue.subprocess, "Popen", start)

    def make(*hows):
        folders = [tmp_path / "out" / f"{n}-{how}" for n, how in enumerate(hows)]
        runs = [Run(how, "1m", n, 1e-3) for n, how in enumerate(hows)]
        wanted = [{"train": {"steps": 10}} for _ in hows]
        arguments = [json.dumps([str(f), how]) for f, how in zip(folders, hows, strict=True)]
        return [queue.Task(*x, CONFIG, argument) for *x, argument in zip(runs, folders, wanted, arguments, strict=True)]

    return make


def work(tasks, *, jobs=1, say=lambda line: None, progress=lambda line: None):
    queue.work(tasks, jobs=jobs, say=say, progress=progress)


def test_all_are_done_and_told_and_not_done_again(tasks):
    lines = []
    both = tasks("done", "done")
    work(both, say=lines.append)
    assert [line.rpartition(" (")[2] for line in lines] == ["1 of 2)", "2 of 2)"] and "2.5000 bits per byte" in lines[0]
    lines.clear()
    work(both, say=lines.append)
    assert not lines


def test_a_failure_stops_the_queue_and_the_others_save(tasks):
    failing, waiting, never = tasks("fails", "waits", "done")
    with pytest.raises(ChildProcessError, match="ended with exit code 2, it says why above"):
        work([failing, waiting, never], jobs=2)
    assert not never.done


def test_a_worker_that_was_killed_has_not_said_why(tasks):
    """The system ends a process so that takes too much memory: there is nothing above to read."""
    with pytest.raises(ChildProcessError, match="was ended by signal 9, as when memory runs out"):
        work(tasks("killed"))


def test_what_another_process_is_at_is_left_to_it(tasks):
    one, other = tasks("done", "done")
    one.folder.parent.mkdir()
    lines = []
    with one.lock:
        work([one, other], say=lines.append)
    assert other.done and not one.done
    assert lines[0].endswith("another process trains it; repeat the command when that has ended")


def test_what_another_process_takes_before_the_worker_is_told(tasks):
    late, other = tasks("late", "done")
    lines = []
    work([late, other], say=lines.append)
    assert other.done and not late.done
    assert lines[0].endswith("another process trains it; repeat the command when that has ended")


def test_a_worker_whose_parent_went_while_it_was_starting_ends():
    """It must not train on alone for hours, at a run that the same command wants to go on with."""
    parent = subprocess.Popen([sys.executable, "-c", ""])
    parent.wait()
    code = "import sys; from retentive.compare.worker import end_with_the_parent as end; end(int(sys.argv[1]))"
    gone = subprocess.run([sys.executable, "-c", code, str(parent.pid)], timeout=60)
    assert gone.returncode == -signal.SIGTERM


def test_a_worker_is_told_its_parent(tasks, monkeypatch):
    started = []
    monkeypatch.setattr(queue.subprocess, "Popen", lambda command, **how: started.append(command))
    queue.start(tasks("done")[0])
    assert started[0][-2] == str(os.getpid())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_time_ends_all_and_nothing_more_begins(number, tasks):
    """Also between two runs, or while one is scored: the queue itself listens, not the training loop."""
    told = threading.Event()
    stop = threading.Thread(target=lambda: (told.wait(30), signal.raise_signal(number)), daemon=True)
    stop.start()
    waiting, never = tasks("waits", "done")
    with pytest.raises(Interrupted, match="stopped with 0 of 2 runs done, all else saved") as caught:
        work([waiting, never], progress=lambda line: told.set())
    assert caught.value.number == number and not never.done


def test_a_record_of_another_comparison_is_refused(tasks, refuses):
    (one,) = tasks("done")
    work([one])
    with refuses("of another comparison (steps 10, now 5); choose another `out`"):
        work([one._replace(about={"train": {"steps": 5}})])


def test_a_model_that_the_variants_name_no_longer_stands_for_is_refused(tasks, refuses):
    """As after the defaults have changed, or a variant of one's own: the same name must not mean two models."""
    words = "its model has rotary='none', this variant 'interleaved'; choose another `out`"
    under_way, done = tasks("done", "done")
    save_model(under_way.folder, build(changed(CONFIG, rotary="none")))
    with refuses(words):
        work([under_way])
    work([done])
    record = json.loads((done.folder / "compared.json").read_text(encoding="utf-8"))
    for config in (CONFIG.written(), replace(CONFIG, vocab_size=99).written(), version_1(CONFIG)[1]):
        (done.folder / "compared.json").write_text(json.dumps(record | {"config": config}), encoding="utf-8")
        assert done.done
    (done.folder / "compared.json").write_text(
        json.dumps(record | {"config": version_1(CONFIG)[1] | {"rotary": "none"}})
    )
    with refuses(words):
        work([done])


def test_progress_is_read_off_the_metrics(tmp_path):
    task = queue.Task(Run("retnet", "1m", 0, 1e-3), tmp_path, {"train": {"steps": 40}}, CONFIG, "")
    job = queue.Job(task, None, time.monotonic() - 10)
    assert job.progress() == "retnet_1m_lr0.001_seed0: begins"
    (tmp_path / "metrics.jsonl").write_text('{"step": 9}\n{"step": 10}\n', encoding="utf-8")
    assert job.progress().startswith("retnet_1m_lr0.001_seed0: step 10/40, 30")  # as long again for each ten
    (tmp_path / "metrics.jsonl").write_text('{"step": 40}\n', encoding="utf-8")
    assert job.progress() == "retnet_1m_lr0.001_seed0: scoring"


def test_the_time_left_is_by_the_steps_of_this_process(tasks):
    (task,) = tasks("waits")  # of 10 steps
    task.folder.mkdir(parents=True)
    metrics = task.folder / "metrics.jsonl"
    assert queue.Job(task, None).progress() == "waits_1m_lr0.001_seed0: begins"
    metrics.write_text('{"step": 6}\n')
    job = queue.Job(task, None, time.monotonic() - 50)
    assert job.progress().endswith("continues at step 6/10")
    metrics.write_text('{"step": 6}\n{"step": 8}\n')  # two steps in 50 s, and two are left
    assert job.progress().endswith("step 8/10, 50 s left")
    metrics.write_text('{"step": 10}\n')
    assert job.progress().endswith("scoring")
