"""Steps that are left out because their loss or their gradient was not finite: a record with "skipped" of each.

How many there were is read from the run's metrics, as far as it goes on from them, so that a resumed run counts on.
"""

from pathlib import Path

from retentive.train.log import read_metrics


class Skips:
    """Counts them, and ends the run where there are too many in a row.

    Args:
        run: whose metrics tell of those before.
        done: the finished steps that it goes on from.
        most: in a row; one more ends it.
    """

    def __init__(self, run: Path, done: int, most: int):
        self.most, self.total, self.in_a_row = most, 0, 0
        for record in read_metrics(run) if done and most else ():
            if record["step"] <= done and "loss" in record:
                self.in_a_row = 0
            elif record["step"] <= done and "skipped" in record:
                self.total, self.in_a_row = record["skipped"], self.in_a_row + 1

    def skip(self, error: FloatingPointError) -> str:
        """Counts a step that failed so, and gives a line that says so.

        Raises:
            FloatingPointError: it is one too many.
        """
        if self.in_a_row == self.most:
            before = f", after {self.most} steps in a row that were left out for that" if self.most else ""
            raise FloatingPointError(f"{error}{before}")
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        return f"{error}: the step is left out, the weights are as before ({self.total} so far)"
