"""Numbers for people, and the checks of what was asked for."""

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
    at_least_one("numbers", [1, 2])
    with refuses("unknown letter 'c', expected one of a, b"):
        known(["a", "c"], ("a", "b"), "letter")
    with refuses("no letter given, expected one of a, b"):
        known([], ("a", "b"), "letter")
    with refuses("numbers must be at least 1, got 0"):
        at_least_one("numbers", [3, 0])
    with refuses("numbers must be at least 1, got none"):
        at_least_one("numbers", [])
