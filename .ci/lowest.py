"""Prints pip constraints: what pyproject.toml requires, at the lowest versions it allows (`name>=1.2` -> `name==1.2`).

Of the package and of its own extras that the tests use; test tools stay new. Read by lines: Python 3.10 has no tomllib.
"""

import re
from pathlib import Path

TABLES = ("dependencies", "plot", "serve", "structured", "triton", "tiktoken")

for name, body in re.findall(
    r"^([\w-]+) = \[(.*?)\]$", Path("pyproject.toml").read_text(encoding="utf-8"), re.M | re.S
):
    if name in TABLES:
        for package, version in re.findall(r'"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)', body):
            print(f"{package}=={version}")
