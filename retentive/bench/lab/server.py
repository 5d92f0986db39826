"""`retentive serve` in a separate process, for benches that measure it from outside."""

import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from retentive.checkpoint import save_model
from retentive.data.tokenizer import Tokenizer
from retentive.models import LanguageModel


@contextmanager
def server(model: LanguageModel, tokenizer: Tokenizer, *options: str) -> Iterator[tuple[subprocess.Popen, int]]:
    """Yields (process, port) of `retentive serve` with this model and options; kills it at the end of the block.

    Raises:
        OSError: the server did not start; with its message.
    """
    with tempfile.TemporaryDirectory(prefix="retentive-bench-", ignore_cleanup_errors=True) as folder:
        run = Path(folder) / "model"
        save_model(run, model, tokenizer)
        # port 0: a free one, which the first line of stderr names
        command = [sys.executable, "-m", "retentive", "serve", str(run), "--port", "0", *options]
        # a separate process, since here server and clients would share Python's lock and be timed together
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process, ThreadPoolExecutor(1) as aside:
            assert process.stderr is not None
            try:
                line = process.stderr.readline()
                if "serving" not in line:
                    raise OSError(f"the server did not start: {line.strip()}")
                aside.submit(_pass_on, process.stderr)  # a full pipe would block the server
                yield process, int(line.rsplit(":", 1)[1])
            finally:  # before the thread pool waits for `_pass_on`, which ends when the process has
                process.kill()


def _pass_on(lines: Iterable[str]) -> None:
    """Prints what the server writes to stderr."""
    for line in lines:
        print("server:", line, end="", file=sys.stderr)
