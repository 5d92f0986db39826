"""Lines of progress: none too soon, none too often."""

from types import SimpleNamespace

from retentive.cli import progress


def test_a_line_is_printed_only_when_the_last_was_long_ago(monkeypatch, capsys):
    times = iter((100.0, 114.9, 115.0, 129.0, 131.0))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(times)))
    lines = progress.Lines()
    for line in ("too soon", "first", "too often", "second"):
        lines(line)
    assert capsys.readouterr().err == "first\nsecond\n"
