"""Numbers for people, and tables of them."""

from retentive.tables import counted, duration, markdown, millions, span


def test_numbers_to_read():
    assert [duration(x) for x in (12.345, 0.0123, 4.56e-6, 1e-9)] == ["12.3 s", "12.3 ms", "4.56 us", "0.001 us"]
    assert [duration(x) for x in (0, 120, 600, 9000)] == ["0 s", "120 s", "10 min", "2.5 h"]
    assert [counted(n, "step") for n in (0, 1, 2, 1000)] == ["0 steps", "1 step", "2 steps", "1,000 steps"]
    assert [millions(n) for n in (0, 99_999, 123_456, 2_100_000_000)] == ["0", "99,999", "0.1 M", "2,100.0 M"]
    assert [span([1.2, 0.9]), span([80.4, 1234.0])] == ["1", "80 to 1,234"]


def test_a_table_of_no_lines_is_none():
    assert markdown(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"
    assert markdown(["a"], []) == ""
