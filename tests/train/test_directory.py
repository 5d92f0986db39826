"""The run directory: checks before a run begins, files that are deleted, and files that are not the run's."""

from pathlib import Path

import pytest

from retentive.train.checkpoints import folders
from retentive.train.directory import RunDirectory, read_options


@pytest.fixture
def run(tmp_path) -> Path:
    """A directory as a run leaves it, with other content in the files."""
    folder = tmp_path / "run"
    for step in (1, 2):
        (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        (folder / "checkpoints" / f"step-{step:08d}" / "training.json").write_text("{}")
    for name in ("train.json", "metrics.jsonl", "config.json", "model.safetensors", "notes.md"):
        (folder / name).write_text('{"train": {"precision": "fp32"}}')
    return folder


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_a_run_with_checkpoints_is_kept_unless_told_otherwise(run, refuses):
    before = names(run)
    with refuses("already holds a run: `resume=True` goes on", FileExistsError), RunDirectory(run).locked():
        pass
    assert names(run) == before
    with RunDirectory(run, existing="resume").locked():
        assert names(run) - {".lock"} == before and len(folders(run)) == 2
    with RunDirectory(run, existing="overwrite").locked():
        assert names(run) - {".lock"} == {"train.json", "config.json", "model.safetensors", "notes.md"}


@pytest.mark.parametrize("existing", ["refuse", "resume"])
def test_what_has_no_checkpoint_begins_anew(existing, run):
    for folder in folders(run):
        (folder / "training.json").unlink()
    (run / ".untrained").touch()
    with RunDirectory(run, existing=existing).locked():
        assert not {"metrics.jsonl", "checkpoints"} & names(run)


def test_a_checkpoint_that_is_half_deleted_is_none(run, monkeypatch):
    """If a run is killed while it clears, weights may be gone already, so nothing may resume from that checkpoint."""

    def killed(path, **how):
        if how:
            return
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("retentive.train.directory.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt), RunDirectory(run, existing="overwrite").locked():
            pass
    assert not folders(run)
    with RunDirectory(run, existing="overwrite").locked():
        assert ".checkpoints.old" not in names(run)


def test_a_file_and_a_model_that_is_no_run_are_refused(run, refuses):
    with refuses("notes.md is a file: choose a folder for the run", FileExistsError):
        RunDirectory(run / "notes.md", existing="overwrite").check()
    (run / "train.json").unlink()
    with refuses("holds a model that is no run", FileExistsError):
        RunDirectory(run, existing="overwrite").check()


def test_a_folder_of_other_things_is_refused_and_an_empty_one_is_not(tmp_path, refuses):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / ".lock").touch()  # as left by a run that is killed at once
    with RunDirectory(folder).locked():
        pass
    (folder / "0.txt").touch()
    for existing in ("refuse", "resume", "overwrite"):
        with refuses("mine holds other things (0.txt): choose a new or an empty folder", FileExistsError):
            RunDirectory(folder, existing=existing).check()


def test_options_are_read_or_named_as_damaged(run, tmp_path, refuses):
    assert read_options(run) == {"train": {"precision": "fp32"}} and read_options(tmp_path / "none") == {}
    for content in ("", "[]", "{}", '{"train": 1}'):
        (run / "train.json").write_text(content)
        with refuses("train.json does not hold a run's options"):
            read_options(run)
