"""The command itself: version, Ctrl-C, and where an error came from."""

import pytest

from retentive.cli import main


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out.startswith("retentive 0.")


def test_ctrl_c_is_130(monkeypatch):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("retentive.cli.generate.main", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["generate", "run"])
    assert stop.value.code == 130


def test_debug_shows_where_an_error_came_from(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RETENTIVE_DEBUG", raising=False)
    with pytest.raises(SystemExit) as stop:
        main(["generate", "nowhere"])
    assert stop.value.code == 2 and capsys.readouterr().err == "retentive: no model folder at nowhere\n"
    monkeypatch.setenv("RETENTIVE_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(["generate", "nowhere"])
