"""Progress lines on stderr, so that stdout holds only the result."""

import sys
import time

from retentive.cli.errors import flags

SECONDS = 15.0
"""Minimum seconds between two lines."""


def say(line: str) -> None:
    """Print a line to stderr at once, also if that is a file; options in it as they are typed."""
    print(flags(line), file=sys.stderr, flush=True)


class Lines:
    """Prints a line in place of a progress bar, as in a batch job's log, at most every SECONDS."""

    def __init__(self) -> None:
        self.last = time.monotonic()  # the first line comes after SECONDS too, so quick commands print none

    def __call__(self, line: str) -> None:
        now = time.monotonic()
        if now - self.last >= SECONDS:
            self.last = now
            say(line)
