"""Lines of progress on stderr, so that stdout has the result alone."""

import sys
import time

from retentive.cli.errors import flags

SECONDS = 15.0
"""Between two lines."""


def say(line: str) -> None:
    """Print a line to stderr at once, also if that is a file; options in it as they are typed."""
    print(flags(line), file=sys.stderr, flush=True)


class Lines:
    """Says a line where nobody looks at a bar, as in a batch job's log, unless another was less than SECONDS ago."""

    def __init__(self) -> None:
        self.last = time.monotonic()  # so the first line comes after SECONDS too: what is quick says nothing

    def __call__(self, line: str) -> None:
        now = time.monotonic()
        if now - self.last >= SECONDS:
            self.last = now
            say(line)
