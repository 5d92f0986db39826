"""A light installation: the operator loads with torch and numpy alone, every room without the optional packages.

Each test uses a fresh interpreter, since pytest and other tests have already imported much in this one.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import retentive

ROOT = Path(retentive.__file__).parents[1]


def fresh(code: str):
    """Returns what `code`, run in a new interpreter, prints as JSON; warnings are errors there too."""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_operator_needs_torch_and_numpy_alone():
    code = """
import json, sys
import numpy, torch
before = set(sys.modules)
from retentive.ops import retention
roots = {name.split(".")[0] for name in set(sys.modules) - before}
q = torch.randn(1, 5, 2, 4, requires_grad=True)
o, state = retention(q, q, q, torch.full((2,), -0.1))
o.sum().backward()
print(json.dumps(sorted(roots - set(sys.stdlib_module_names))))
"""
    assert fresh(code) == ["retentive"]


OPTIONAL = ["matplotlib", "pyarrow", "zstandard", "datasets", "tiktoken", "tensorboard", "wandb", "pandas"]
OPTIONAL += ["transformers", "triton"]  # for hf, for the GPU kernels
OPTIONAL += ["fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client", "jinja2", "ray"]  # for serve
WITHOUT = ["retentive.serve", "retentive.serve.options", "retentive.data.templates", "retentive.serve.sessions"]
OPTIONAL += ["llguidance"]  # for structured output
OPTIONAL += ["lm_eval"]  # for evals

WALK = """
import importlib, json, pkgutil, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
try:
    import matplotlib
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the block does not block")
import retentive
names, failed = [], []
for module in pkgutil.walk_packages(retentive.__path__, "retentive.", onerror=lambda name: None):
    if module.name.startswith(("retentive.ops.triton", "retentive.hf")) or module.name.endswith("__main__"):
        continue
    if module.name.startswith("retentive.serve") and module.name not in {without}:
        continue
    names.append(module.name)
    try:
        importlib.import_module(module.name)
    except Exception as error:
        failed.append(f"{{module.name}}: {{type(error).__name__}} {{error}}")
print(json.dumps([names, failed]))
"""


def test_every_module_can_be_imported_without_the_optional_packages():
    """Excluded: ops/triton, which backends.py imports on GPUs, hf, whose classes are transformers', and __main__.

    Also excluded is all of serve except what the command line and the terminal chat import.
    """
    names, failed = fresh(WALK.format(blocked=set(OPTIONAL), without=WITHOUT))
    assert failed == []
    assert "retentive.hf" not in names
    assert set(WITHOUT) <= set(names)
    assert {"retentive.ops.blocked", "retentive.checkpoint.folder", "retentive.data.sources"} <= set(names)


def test_without_transformers_its_classes_name_the_extra():
    code = """
import json, sys
sys.modules["transformers"] = None
try:
    import retentive.hf
except ImportError as error:
    print(json.dumps(str(error)))
"""
    assert fresh(code) == "transformers is missing: pip install 'retentive[hf]'"


@pytest.mark.slow
def test_an_old_transformers_is_named():
    code = """
import json, transformers
transformers.__version__ = "5.3.1"
try:
    import retentive.hf
except ImportError as error:
    print(json.dumps(str(error)))
"""
    pytest.importorskip("transformers")
    assert fresh(code) == "transformers 5.3.1 is too old: pip install 'transformers>=5.16'"
