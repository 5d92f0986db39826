"""The log for people and programs: lines, sizes, and the writers of TensorBoard and W&B, really run."""

import errno
import json
import os
import sys
from types import ModuleType

import pytest

from retentive.evals.heldout import HeldOut
from retentive.train import TrainConfig
from retentive.train.log import Log, check_extras, read_metrics
from retentive.train.speed import Speedometer

STEP = {"loss": 2.5, "lr": 1e-3, "grad_norm": 1.0}
SPEED = {"tokens_per_second": 10.0, "mfu": 0.5, "memory": 2**30}


class Steady(Speedometer):
    """Speedometer that measures nothing."""

    def __init__(self):
        pass

    def start(self):
        pass

    def read(self, tokens):
        return SPEED


def log_in(folder, config, **how) -> Log:
    return Log(folder, config, start=0, speedometer=Steady(), **how)


def record(log, step, **metrics) -> None:
    log.begin_step()
    log.step(step, {**STEP, **metrics, "tokens": 20})


def write(folder, config) -> None:
    """Write two steps, an evaluation and a sample."""
    folder.mkdir()
    with log_in(folder, config) as log:
        for step in (1, 2):
            record(log, step, loss=2.5 / step)
        log.held_out(2, HeldOut(2.0, 3.0, 40, 2_500_000))
        log.held_out(2, HeldOut(2.0, 3.5, 400, 12_345), last=True)
        log.sample(2, "some text")


def test_an_evaluation_at_the_end_is_told_from_the_one_before_it(tmp_path, capsys):
    write(tmp_path / "run", TrainConfig(steps=2))
    lines = [line for line in capsys.readouterr().err.splitlines() if "held-out" in line]
    assert lines == [
        "step 2: held-out 3.000 bits per byte of 2.5 MB",
        "step 2: held-out 3.500 bits per byte of 12.3 kB (the longer part, read once at the end)",
    ]


def test_what_was_all_the_text_is_told_once_and_recorded_twice(tmp_path, capsys):
    with log_in(tmp_path, TrainConfig(steps=2)) as log:
        for last in (False, True):
            log.held_out(2, HeldOut(2.0, 3.0, 40, 12_345), last=last)
    assert capsys.readouterr().err == "step 2: held-out 3.000 bits per byte of 12.3 kB\n"
    kinds = [set(json.loads(line)) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert "bits_per_byte" in kinds[0] and "final_bits_per_byte" in kinds[1]


def test_what_does_not_fit_on_the_disk_is_written_later(tmp_path, monkeypatch):
    """A full disk does not end the run, but no checkpoint is written for steps that are not logged."""
    full = True

    class Disk:
        """A file that takes ten more bytes, then nothing while the disk is full."""

        def __init__(self, fd: int):
            self.fd, self.left = fd, 10

        def write(self, data) -> int:
            if full and not self.left:
                raise OSError(errno.ENOSPC, "No space left on device")
            written = os.write(self.fd, data[: self.left if full else None])
            self.left -= written if full else 0
            return written

        def close(self) -> None:
            os.close(self.fd)

    with log_in(tmp_path, TrainConfig(steps=3), quiet=True) as log:
        log._file.close()
        log._file = Disk(os.open(tmp_path / "metrics.jsonl", os.O_WRONLY | os.O_CREAT))
        for step in (1, 2):
            record(log, step)
        with pytest.raises(OSError, match=r"cannot write .*metrics.jsonl: No space left"):
            log.check()
        full = False
        record(log, 3)
        log.check()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_damaged_line_is_told_of_and_nothing_is_dropped(tmp_path):
    """The last line is an exception: a crash may have cut it short."""
    file = tmp_path / "metrics.jsonl"
    text = '{"step": 1}\ngarbage\n{"step": 3}\n'
    file.write_text(text)
    with pytest.raises(ValueError, match=r"metrics.jsonl:2 is no record"):
        Log(tmp_path, TrainConfig(steps=5), start=3, speedometer=Steady())
    assert file.read_text() == text


def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard", reason="the extra `log` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path / "run", TrainConfig(steps=2, tensorboard=True))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.5), (2, 1.25)]
    assert [(e.step, e.value) for e in events.Scalars("final_bits_per_byte")] == [(2, 3.5)]
    assert "sample" not in events.Tags()["scalars"]


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """The library as in a new process without a login."""
    library = pytest.importorskip("wandb", reason="the extra `log` is not installed")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    library.teardown()
    yield library
    library.teardown()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # wandb's own
def test_wandb_keeps_what_was_written(tmp_path, monkeypatch, wandb):
    """Offline: the records go into a file that `wandb sync` would upload."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = TrainConfig(steps=2, wandb="project")
    check_extras(config)
    write(tmp_path / "run", config)
    wandb.teardown()  # its own process writes the file to its end
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    assert all(name in content for name in (b"project", b"tokens_per_second", b"final_bits_per_byte"))


def test_the_writer_that_is_missing_is_the_one_that_is_named(monkeypatch, refuses):
    """None in sys.modules makes Python treat the module as missing."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", ModuleType("here"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with refuses("`wandb` needs an extra: pip install 'retentive[log]'", ModuleNotFoundError):
        check_extras(TrainConfig(tensorboard=True, wandb="project"))


@pytest.mark.filterwarnings("default")
def test_wandb_without_a_login_is_told_before_anything_is_made(monkeypatch, wandb, refuses):
    monkeypatch.setattr("sys.stdin", None)  # in a terminal it asks
    with refuses("`wandb` needs a login: run `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline"):
        check_extras(TrainConfig(wandb="project"))


def test_metrics_are_lines_of_json(tmp_path):
    write(tmp_path / "run", TrainConfig(steps=2))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2, 2, 2]
    assert lines[0] == {"step": 1, **STEP, **SPEED} and lines[4] == {"step": 2, "sample": "some text"}


@pytest.mark.parametrize("line", ["junk{", "[]", "5", "{}", "\udcff"])
def test_a_damaged_record_is_named_with_its_line(line, tmp_path, refuses):
    write(tmp_path / "run", TrainConfig(steps=2))
    with open(tmp_path / "run/metrics.jsonl", "a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(line)
    assert len(read_metrics(tmp_path / "run")) == 5  # as if it were still being written
    with open(tmp_path / "run/metrics.jsonl", "a", encoding="utf-8") as file:
        file.write("\n")
    with refuses(f"{tmp_path}/run/metrics.jsonl:6 is no record of training"):
        read_metrics(tmp_path / "run")


def test_a_folder_that_is_no_run(tmp_path, refuses):
    with refuses(f"{tmp_path} is no run of `retentive train`", FileNotFoundError):
        read_metrics(tmp_path)
