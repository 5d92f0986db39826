"""Number of threads of a call, with made-up times."""

import pytest

from retentive.native.threads import Pace


def chosen(pace, seconds, now, calls=400, apart=0.01):
    """Numbers of threads of `calls` calls from `now` on, which take `seconds(threads, now)`."""
    found = []
    for n in range(calls):
        at = now + n * apart
        found.append(pace.threads(at))
        pace.note(found[-1], seconds(found[-1], at), at)
    return found


def share(found, threads):
    return found.count(threads) / len(found)


@pytest.mark.parametrize(("speed", "best"), [([1, 0.6], 2), ([1, 1.5], 1), ([1, 0.97], 1), ([1, 0.9], 2)])
def test_the_fastest_number_is_taken_and_of_equals_the_smaller(speed, best):
    found = chosen(Pace(2), lambda threads, _: speed[threads - 1], 0.0)
    assert share(found[6:], best) > 0.9


def test_of_many_cores_as_many_as_pay():
    pace = Pace(12)
    assert pace.numbers == [1, 2, 4, 8, 12]
    found = chosen(pace, lambda threads, _: max(1 / threads, 0.25) + 0.01 * threads, 0.0, calls=1000)
    assert share(found[15:], 4) > 0.85


def test_one_thread_is_always_one():
    assert set(chosen(Pace(1), lambda *_: 1.0, 0.0)) == {1}


def test_a_core_is_left_to_a_neighbour_while_there_is_one():
    """From 4 s to 12 s, a neighbour makes two threads wait long for each other in every third call."""

    def seconds(threads, now):
        stalled = 4 <= now < 12 and round(now * 100) % 3 == 0
        return 1.0 if threads == 1 else 6.0 if stalled else 0.6

    pace = Pace(2)
    assert share(chosen(pace, seconds, 0.0), 2) > 0.9
    assert share(chosen(pace, seconds, 4.0, calls=800), 1) > 0.8
    assert share(chosen(pace, seconds, 12.0, calls=1000)[100:], 2) > 0.9


def long_prompts(cores, calls):
    """Numbers of threads, and seconds in all, of prompts read one after the other, 8 s each with one thread."""
    pace, now, found = Pace(cores), 0.0, []
    for _ in range(calls):
        found.append(pace.threads(now))
        took = 8 / found[-1]
        pace.note(found[-1], took / 2048, now, took)
        now += took
    return found, now


def test_long_calls_are_tried_seldom():
    """Without a bound, three of five prompts would be read with half the threads, for ever."""
    found, seconds = long_prompts(2, 200)
    assert found[:3] == [2, 2, 1] and share(found[3:], 2) > 0.95 and seconds < 1.06 * 200 * 4


def test_of_long_calls_no_number_is_tried_that_is_far_too_small():
    found, _ = long_prompts(16, 100)
    assert set(found) == {16, 8} and share(found, 16) > 0.9


def test_a_single_stall_is_forgotten_soon():
    pace = Pace(2)
    found = chosen(pace, lambda threads, now: 50.0 if now == 2.0 else 1 / threads, 0.0)
    assert share(found[201:], 1) < 0.1
