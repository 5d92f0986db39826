"""`retentive info` in a narrow terminal and in a pipe."""

import pytest
from rich.console import Console

from retentive.cli import main
from retentive.cli.info import InfoCommand, show
from retentive.models import PRESETS


def test_eighty_columns_hold_all_sizes():
    console = Console(width=80, force_terminal=True, no_color=True)
    with console.capture() as shown:
        show(console, InfoCommand(sizes=True))
    assert "…" not in shown.get() and all(name in shown.get() for name in PRESETS)


def test_nothing_is_cut_in_a_pipe(capsys, monkeypatch):
    """Whatever the width of the terminal behind it."""
    monkeypatch.setenv("COLUMNS", "30")
    main(["info", "--sizes"])
    assert "…" not in capsys.readouterr().out
    main(["info", "5m"])
    assert "Its memory is smaller than the Transformer's from 113 tokens of context.\n" in capsys.readouterr().out


def test_every_model_that_has_a_name(capsys):
    for name, shown in {"retnet-paper": "RetNet", "transformer": "Transformer", "hybrid": "Hybrid"}.items():
        main(["info", name, "--size", "1m", "--vocab-size", "257"])
        out = capsys.readouterr().out
        assert out.startswith(f"{shown}, architecture {name} in size 1m")
        assert ("Differs from `--model retnet`" in out) == (name == "retnet-paper")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["1m", "--size", "5m"], "--size 5m is for an architecture, such as hybrid: leave it out"),
        (["hybrid", "--sizes"], "--sizes lists those of RetNets: leave out hybrid"),
        (["novels", "--set", "heads=2"], "--set changes a size or an architecture, such as hybrid: leave it out"),
        (["--sizes", "--set", "heads=2"], "--set changes a size or an architecture, such as hybrid: leave it out"),
        (["novels", "--vocab-size", "9"], "--vocab-size is for a size or an architecture, such as hybrid"),
        (["5m", "--set", "head=2"], "--set head=2: unknown field 'head': did you mean heads?"),
        (["hybrid", "--set", "attention=[9]"], "attention names block 9"),
        (["--set", "heads=2"], "info needs a run, a model folder, a size"),
        (["Hybrid"], "unknown model folder, size or architecture 'Hybrid': did you mean hybrid?"),
        (["novel"], "did you mean novels?"),
    ],
)
def test_options_that_would_do_nothing_are_refused(argv, words, capsys):
    with pytest.raises(SystemExit):
        main(["info", *argv])
    assert words in capsys.readouterr().err


def test_a_change_to_an_architecture_or_a_size(capsys):
    main(["info", "hybrid", "--size", "1m", "--set", "attention=[0]"])
    out = capsys.readouterr().out
    assert out.startswith("Hybrid, architecture hybrid in size 1m, with attention=[0]")
    assert "0 attention, 1 retention, 2 retention" in out
    for named in (["retnet", "--size", "1m"], ["1m"]):
        main(["info", *named, "--set", "convolution=4", "heads=2"])
        assert "with convolution=4 heads=2\n" in capsys.readouterr().out


def test_changes_of_several_options_are_joined_and_the_later_counts(capsys):
    main(["info", "1m", "--set", "convolution=4", "heads=1", "--set=gate=false", "--set", "heads=2"])
    assert "with convolution=4 gate=false heads=2\n" in capsys.readouterr().out


def test_equal_blocks_that_stand_apart_are_shown_once(capsys):
    main(["info", "hybrid", "--size", "1m"])
    text = capsys.readouterr().out
    assert text.count("x retention:") == text.count("x attention:") == 1 and "(2) 3 x retention: dim=128" in text
    assert "in the order 1 2 3 1 4 5 1 2 3 1 4 5 1 2 3" in text
    kinds = "0 retention, 1 attention, 2 retention, 3 attention, 4 retention"
    assert f"`attention` counts the blocks that are no convolutions: {kinds}" in text
