"""Rooms import only from floors below, and follow the conventions that can be checked. FLOORS is the oracle.

Lazy imports count. A room without a floor is an error: add it to FLOORS first.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

import retentive

FLOORS = [
    "files machine threads options tables page",
    "sampling",
    "ops",
    "layers",
    "models data",
    "checkpoint",
    "multimodal native",
    "infer",
    "evals",
    "train",
]
FLOORS += ["hf export serve bench", "compare linearization", "report calls", "cli", "__main__"]
FLOOR = {room: n for n, rooms in enumerate(FLOORS) for room in rooms.split()}
FACE = {"load": "checkpoint", "__version__": None}  # names of the package itself, and the room each comes from
PACKAGE = Path(retentive.__file__).parent
RECIPES = Path(__file__).parents[1] / "recipes"


parse = cache(ast.parse)  # several tests read the same trees


def modules(package: Path) -> list[tuple[Path, ast.Module]]:
    """Returns each module's path below the package, and its tree."""
    files = sorted(package.rglob("*.py"))
    return [(file.relative_to(package), parse(file.read_text(encoding="utf-8"))) for file in files]


def room_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def imported(tree: ast.Module, name: str) -> list[tuple[int, str]]:
    """Returns (line, dotted name) of every import, lazy ones too; `from a import b` is a.b, relative ones keep dots."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            found += [(node.lineno, f"{start}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and isinstance(node.args[0] if node.args else None, ast.Constant):
            called = ast.unparse(node.func).split(".")[-1]
            if called in ("import_module", "__import__") and str(node.args[0].value).startswith((name, ".")):
                found.append((node.lineno, node.args[0].value))
    return found


def violations(package: Path) -> list[str]:
    """Returns the imports that break the order of floors, one line each."""
    bad = []
    for path, tree in modules(package):
        room = room_of(path)
        if room == "__init__":  # the package itself imports any room, lazily
            continue
        if room not in FLOOR:
            bad.append(f"{path}: room {room!r} has no floor")
            continue
        for line, name in imported(tree, package.name):
            parts = name.split(".")
            if not parts[0]:
                bad.append(f"{path}:{line} imports {name}: relative")
            elif parts[0] == package.name:
                other = FACE.get(parts[1], parts[1]) if len(parts) > 1 else FACE["load"]
                if other not in (None, room) and FLOOR.get(other, len(FLOORS)) >= FLOOR[room]:
                    bad.append(f"{path}:{line} imports {name}: not from a floor below {room}")
    return bad


def test_rooms_import_from_the_floors_below_them_only():
    assert violations(PACKAGE) == []


PLANTED = {
    "up": ("ops/a.py", "from retentive.layers import RMSNorm"),
    "up-lazily": ("layers/a.py", "def f():\n    import retentive.models.config"),
    "up-by-from-package": ("ops/a.py", "from retentive import layers"),
    "sideways": ("data/a.py", "from retentive.models import LanguageModel"),
    "over-the-roof": ("models/a.py", "from retentive import load"),
    "the-package-itself": ("models/a.py", "import retentive"),
    "by-name": ("train/a.py", "from importlib import import_module\nimport_module('retentive.serve')"),
    "relative": ("models/a.py", "from .config import ModelConfig"),
    "relative-upward": ("ops/a.py", "from .. import layers"),
    "nested-package": ("ops/triton/a.py", "from retentive.data import pack"),
    "room-without-floor": ("utils/a.py", "X = 1"),
    "module-as-room": ("helpers.py", "X = 1"),
    "a-bench-that-judges": ("bench/a.py", "from retentive.compare import Comparison"),
    "scores-from-training": ("evals/a.py", "def f():\n    from retentive.train import train"),
    "a-comparison-of-the-command-line": ("compare/a.py", "from retentive.cli import main"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_the_check_sees_a_planted_violation(case, tmp_path):
    package = tmp_path / "retentive"
    good = {
        "__init__.py": "def load():\n    from retentive.checkpoint import load",
        "ops/b.py": "import torch\nfrom retentive.ops import retention",
        "models/b.py": "from retentive.ops import decay\nfrom retentive import __version__",
        "infer/b.py": "from retentive import load",
        "cli.py": "import retentive\nfrom importlib import import_module\nimport_module('retentive.serve')",
        "__main__.py": "from retentive.cli import main",
    }
    path, text = PLANTED[case]
    for name, source in good.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(source, encoding="utf-8")
    assert violations(package) == []
    (package / path).parent.mkdir(parents=True, exist_ok=True)
    (package / path).write_text(text, encoding="utf-8")
    found = violations(package)
    assert len(found) == 1 and found[0].startswith(path)


def test_the_package_needs_nothing_of_the_repository_around_it():
    around = ("benchmarks", "recipes", "tests")
    lines = [
        f"{path}:{line} imports {name}"
        for path, tree in modules(PACKAGE)
        for room in around
        for line, name in imported(tree, room)
        if name.split(".")[0] == room
    ]
    assert lines == []


def test_recipes_lean_on_the_library_and_never_on_the_command_line():
    recipes = {path: ast.parse(path.read_text(encoding="utf-8")) for path in RECIPES.glob("*.py")}
    assert recipes
    rooms = {
        (path.name, name.split(".")[1])
        for path, tree in recipes.items()
        for _, name in imported(tree, PACKAGE.name)
        if name.startswith(f"{PACKAGE.name}.")
    }
    assert {(recipe, room) for recipe, room in rooms if FLOOR[room] >= FLOOR["report"]} == set()
    whole = ("train", "compare", "linearization")
    assert {recipe for recipe, room in rooms if room in whole} == {path.name for path in recipes}


def calls(tree: ast.Module, name: str) -> list[int]:
    """Returns the lines that call the builtin `name`."""
    nodes = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name))
    return [n.lineno for n in nodes if n.func.id == name]


def test_triton_is_imported_in_its_own_room_only():
    lines = [
        f"{path}:{line}"
        for path, tree in modules(PACKAGE)
        for line, name in imported(tree, PACKAGE.name)
        if name.split(".")[0] == "triton" and path.parts[:2] != ("ops", "triton")
    ]
    assert lines == []


def test_every_module_says_what_it_is_for():
    assert [str(path) for path, tree in modules(PACKAGE) if not ast.get_docstring(tree)] == []


def test_no_room_guesses_what_an_object_has():
    assert [f"{path}:{line}" for path, tree in modules(PACKAGE) for line in calls(tree, "hasattr")] == []


def test_the_lower_rooms_print_nothing():
    lower = ("ops", "layers", "models")
    assert [f"{p}:{line}" for p, tree in modules(PACKAGE) if room_of(p) in lower for line in calls(tree, "print")] == []


@pytest.mark.parametrize("source", ["import triton.language as tl", "def f():\n    from triton import jit"])
def test_the_check_for_triton_sees_it(source):
    assert [name.split(".")[0] for _, name in imported(ast.parse(source), "retentive")] == ["triton"]


@pytest.mark.parametrize("source", ["def f(x):\n    return hasattr(x, 'y')", "if True:\n    print(1)"])
def test_the_check_for_calls_sees_them(source):
    assert len(calls(ast.parse(source), "print" if "print" in source else "hasattr")) == 1


KINDS = {"ModelConfig", "PeerConfig", "RetentionConfig", "AttentionConfig", "RetentionMemory", "AttentionMemory"}
"""Classes of configs and memories, which rooms above models ask for properties and never for their class."""


def asks_for_kind(tree: ast.Module) -> list[int]:
    """Returns the lines of `isinstance(x, KIND)` and of `type(x.config) is …`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            names = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
            found += [node.lineno] if names & KINDS else []
        if isinstance(node, ast.Compare) and ast.unparse(node.left).startswith("type("):
            found += [node.lineno] if "config" in ast.unparse(node.left) else []
    return found


def test_nobody_above_models_asks_for_the_kind_of_a_config_or_a_memory():
    wrong = [
        f"{path}:{line}"
        for path, tree in modules(PACKAGE)
        if room_of(path) not in ("models", "layers")
        for line in asks_for_kind(tree)
    ]
    assert wrong == []
    source = "isinstance(c, A | ModelConfig)\ntype(model.config) is not X\nisinstance(c, A)"
    assert asks_for_kind(ast.parse(source)) == [1, 2]
