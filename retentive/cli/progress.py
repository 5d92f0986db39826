"""Progress where nobody looks at a terminal, as in a batch job's log: a line on stderr now and then."""

import sys
import time

SECONDS = 15.0
"""Between two lines."""


class Lines:
    """Prints a line of progress on stderr, unless another was printed less than SECONDS ago."""

    def __init__(self) -> None:
        self.last = time.monotonic()  # so the first line comes after SECONDS too: what is quick says nothing

    def __call__(self, line: str) -> None:
        now = time.monotonic()
        if now - self.last >= SECONDS:
            self.last = now
            print(line, file=sys.stderr, flush=True)
