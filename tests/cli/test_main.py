"""The command itself: version, Ctrl-C, and where an error came from."""

import io
import runpy
import sys

import pytest

from retentive.cli import main


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out.startswith("retentive 0.")


def test_ctrl_c_is_130_and_says_that_nothing_is_saved(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    said = "stopped before the first step of this command: nothing was saved yet"
    for verb, lines in (("generate", [""]), ("compare", ["", said])):
        monkeypatch.setattr(f"retentive.cli.{verb}.main", interrupted)
        with pytest.raises(SystemExit) as stop:
            main([verb, "run"])
        assert stop.value.code == 130 and capsys.readouterr().err.splitlines() == lines


def test_debug_shows_where_an_error_came_from(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RETENTIVE_DEBUG", raising=False)
    with pytest.raises(SystemExit) as stop:
        main(["generate", "nowhere"])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("retentive: no model folder at nowhere: ")
    monkeypatch.setenv("RETENTIVE_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(["generate", "nowhere"])


def test_what_the_locale_cannot_write_is_a_question_mark(monkeypatch):
    """Not an error at the end of hours of work."""
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr("retentive.cli.run", lambda argv: print("1.5 ± 0.2"))
    main(["compare"])
    assert raw.getvalue() == b"1.5 ? 0.2\n"


def test_closed_streams_are_empty_ones(monkeypatch):
    """`<&- >&- 2>&-`: Python has None for them."""
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    told = []
    monkeypatch.setattr("retentive.cli.run", lambda argv: told.append((sys.stdin.read(), sys.stdout.write("a"))))
    main(["generate"])
    assert told == [("", 1)]
    for name in ("stdin", "stdout", "stderr"):
        getattr(sys, name).close()


def test_importing_the_main_module_runs_nothing(capsys):
    runpy.run_module("retentive.__main__", run_name="imported")
    assert capsys.readouterr() == ("", "")
