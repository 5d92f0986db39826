"""Checks of options: types of values, including NumPy's, and misspelt names."""

from collections.abc import Mapping
from numbers import Integral, Real
from types import SimpleNamespace

import numpy as np
import pytest

from retentive.options import at_least_one, check_names, check_type, known

FITS = [(int, 3), (float, 3), (float, np.float64(3)), (bool, True), (str, "x"), (Mapping, {}), (Integral, np.int64(3))]
FITS += [(Real, np.float32(3)), (Real, 3), (Integral, 3)]
FAILS = [
    (int, True, "a whole number, got True"),
    (int, 2.5, "a whole number, got 2.5"),
    (int, np.int64(3), "a whole number"),  # json cannot write them
    (float, "hot", "a number, got 'hot'"),
    (Real, True, "a number, got True"),
    (bool, 1, "True or False, got 1"),
    (str, None, "a string, got None"),
    (Mapping, [], "a dictionary, got []"),
]


@pytest.mark.parametrize(("kind", "value"), FITS, ids=repr)
def test_what_fits(kind, value):
    check_type("it", value, kind)


@pytest.mark.parametrize(("kind", "value", "words"), FAILS, ids=repr)
def test_what_does_not(kind, value, words, refuses):
    with refuses(f"it must be {words}", TypeError):
        check_type("it", value, kind)


def test_names(refuses):
    check_names("it", ["a"], {"a", "b"})
    with refuses("it has no option 'max_token': did you mean max_tokens?", TypeError):
        check_names("it", ["max_token"], ["max_tokens", "stop"])
    with refuses("it has no option 'zzz': expected one of a, b", TypeError):
        check_names("it", ["a", "zzz"], ["b", "a"])


def test_what_is_asked_for_is_checked(refuses):
    known(["a"], ("a", "b"), "letter")
    options = SimpleNamespace(right=(1, 2), one=1, small=(3, 0), nothing=(), zero=0)
    at_least_one(options, "right", "one")
    with refuses("unknown letter 'c', expected one of a, b"):
        known(["a", "c"], ("a", "b"), "letter")
    with refuses("no letter given, expected one of a, b"):
        known([], ("a", "b"), "letter")
    for field, got in (("small", "(3, 0)"), ("zero", "0"), ("nothing", "()")):
        with refuses(f"`{field}={got}`: must be at least 1"):
            at_least_one(options, "right", field)
