"""The fixtures of `retentive.bench`'s tests."""

from tests.bench.conftest import lines, never_timed, one_thread, rates, sizes

__all__ = ["lines", "never_timed", "one_thread", "rates", "sizes"]
