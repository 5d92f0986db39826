"""Numbers for people, and the checks of what was asked for."""

from types import SimpleNamespace

from retentive.bench.lab.tables import at_least_one, duration, known, markdown, size, span


def test_numbers_to_read():
    assert [duration(x) for x in (12.345, 0.0123, 4.56e-6, 1e-9)] == ["12.3 s", "12.3 ms", "4.56 us", "0.001 us"]
    assert [size(x) for x in (1.5e9, 12_345_678, 100)] == ["1.5 GB", "12.3 MB", "0.1 kB"]
    assert [span([1.2, 0.9]), span([80.4, 1234.0])] == ["1", "80 to 1,234"]


def test_a_table_of_no_lines_is_none():
    assert markdown(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"
    assert markdown(["a"], []) == ""


def test_what_is_asked_for_is_checked(refuses):
    known(["a"], ("a", "b"), "letter")
    options = SimpleNamespace(right=(1, 2), one=1, small=(3, 0), nothing=(), zero=0)
    at_least_one(options, "right", "one")
    with refuses("unknown letter 'c', expected one of a, b"):
        known(["a", "c"], ("a", "b"), "letter")
    with refuses("no letter given, expected one of a, b"):
        known([], ("a", "b"), "letter")
    for field, got in (("small", "0"), ("zero", "0"), ("nothing", "none")):
        with refuses(f"{field} must be at least 1, got {got}"):
            at_least_one(options, "right", field)
