"""As for benches: one thread, and a look at the lines of a plot."""

from tests.bench.conftest import lines, one_thread

__all__ = ["lines", "one_thread"]
