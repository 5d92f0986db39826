"""`python -m benchmarks redraw FILE…`: renew tables and pictures of results from the numbers in their files.

It serves changes of the presentation; the measured numbers stay the same.
"""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import BENCHES
from retentive.bench import BENCHES as OURS
from retentive.bench.run import draw, title_of
from retentive.files import write_json
from retentive.report.page import kind_of

ALL = OURS | BENCHES


def redraw(paths: Sequence[Path]) -> list[Path]:
    """Write the table of each result, and the pictures beside it; returns these files.

    Raises:
        OSError, ValueError: a file cannot be read or written, or is damaged.
    """
    done = []
    for path in paths:
        result = json.loads(path.read_text(encoding="utf-8"))
        verb, _, name = kind_of(result.get("command", "")).partition(" ")
        module: Any = importlib.import_module("retentive.compare") if verb == "compare" else None
        if verb == "bench" and name in ALL:
            module = importlib.import_module(ALL[name])
            write_json(path, result | {"table": module.table(result)})
        if module is None:
            continue
        if path.with_suffix(".png").exists():
            title = module.title_of(result) if verb == "compare" else title_of(module, result)
            draw(path, module.plot, result, title)
        done.append(path)
    return done
