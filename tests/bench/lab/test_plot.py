"""Panels of pictures: curves of what has several points, rankings of what has one, no more curves than can be read."""

import pytest

from retentive.bench.lab import plot


@pytest.fixture
def axis():
    pytest.importorskip("matplotlib")
    return plot.grid("a title", 1, 1)[1][0, 0]


def of(**seconds):
    return {name: {"seconds": x} for name, x in seconds.items()}


def test_curves_by_x_where_each_model_was_measured(axis, lines):
    points = [(2048, of(a=4e-3, b=1e-3) | {"c": {}}), (512, of(a=2e-3))]
    names = {"a": "A", "b": "B", "c": "C"}
    plot.panel(axis, points, names, "seconds", "a step (ms)", "tokens", unit=1e-3)
    assert lines == {"A": [([512, 2048], [2.0, 4.0])], "B": [([2048], [1.0])]}
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["512", "2k"]
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_yscale()) == ("tokens", "a step (ms)", "log")


def test_one_x_is_a_ranking(axis, lines):
    plot.panel(axis, [(512, of(a=3.0, b=1.0))], {"a": "A", "b": "B"}, "seconds", "a step (s)", "tokens")
    assert not lines and [tick.get_text() for tick in axis.get_yticklabels()] == ["A", "B"], "the least on top"
    assert axis.get_xlabel() == "a step (s), tokens 512"
    assert [list(line.get_xdata()) for line in axis.get_lines()] == [[3.0], [1.0]]


def test_fractions_are_percentages_from_zero(axis):
    plot.panel(axis, [(1, of(a=0.5)), (2, of(a=0.7))], {"a": "A"}, "seconds", "of the limit", "batch", percent=True)
    assert axis.get_yscale() == "linear" and axis.get_ylim()[0] == 0
    assert axis.yaxis.get_major_formatter()(0.5) == "50%"


def test_the_first_and_the_fastest_are_shown():
    names = [f"m{n}" for n in range(11)]
    last = of(**{name: 11.0 - n for n, name in enumerate(names)}) | {"m10": {"skipped": "no room"}}
    assert plot.at_most(names, last) == ["m0", *names[3:10]]
    assert plot.at_most(names[:8], last) == names[:8]


def test_a_legend_has_each_label_once_and_none_of_rankings():
    pytest.importorskip("matplotlib")
    figure, axes = plot.grid("a title", 1, 2)
    plot.rank(axes[0, 0], [("A", 1.0, None, {})], "seconds")
    plot.legend(figure, axes)
    assert not figure.legends
    for axis, label in zip((*axes.flat, axes[0, 0]), "ABA", strict=True):
        axis.plot([1, 2], [1, 2], label=label)
    plot.legend(figure, axes)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["A", "B"]


def test_a_title_of_two_lines_does_not_break_within_brackets():
    pytest.importorskip("matplotlib")
    figure, _ = plot.grid("Decoding (130m) on AMD EPYC (family 25, model 17), 2 threads", 1, 1, size=(4.8, 4))
    first, second = figure.get_suptitle().splitlines()
    assert "(family" not in first and second.replace("\N{NO-BREAK SPACE}", " ") == "(family 25, model 17), 2 threads"
