"""Each leaf room can be deleted with its own verbs: the rest still imports, trains, scores and generates.

One process per room, on a copy of the package without it. Requests for a deleted room end with one line.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import retentive

pytestmark = pytest.mark.slow

PACKAGE = Path(retentive.__file__).parent
# what goes with each leaf room: verbs that need it, and the room that builds on it
WITH_IT = {
    "hf": [],
    "export": ["cli/export.py", "cli/generate_exported.py"],
    "serve": ["cli/serve.py"],
    "multimodal": [],
    "compare": ["cli/compare.py", "cli/report.py", "report"],
    "report": ["cli/report.py"],
}
# commands that need a deleted room
GONE = {
    "export": [["export", "run"], ["generate", "run.onnx"]],
    "serve": [["serve", "run"]],
    "compare": [["compare", "run"], ["report", "run"]],
    "report": [["report", "run"]],
}
LEAVES = [room for room in WITH_IT if (PACKAGE / room).is_dir()]

WITHOUT = """
import contextlib, importlib, io, json, pkgutil, sys
from pathlib import Path
import retentive
from retentive.cli import main

assert Path(retentive.__file__).parents[1] == Path.cwd(), retentive.__file__
failed, outcomes = {}, {}
for module in pkgutil.walk_packages(retentive.__path__, "retentive.", onerror=lambda name: None):
    if module.name.startswith("retentive.ops.triton") or module.name.endswith("__main__"):
        continue  # the one is reached where a GPU is, the other runs when imported
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        if (error.name or "retentive").startswith("retentive"):  # else a package that is not installed
            failed[module.name] = str(error)

tiny = "--size 1m --set dim=16 layers=1 heads=1 --batch 2 --length 16 --steps 2 --warmup 1"
commands = [
    ["data", "text", "--out", "data", "--tokenizer", "bytes"],
    ["train", "--data", "data", "--out", "run", *tiny.split(), "--precision", "fp32", "--device", "cpu"],
    ["eval", "run", "--tasks", "lambada_openai", "--data", "tasks"],
    ["generate", "run", "--prompt", "The", "--max-tokens", "2"],
    *json.loads(sys.argv[1]),
]
for command in commands:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(command)
        except SystemExit as end:
            code = end.code
    outcomes[" ".join(command[:2])] = code, out.getvalue(), err.getvalue()
print(json.dumps([failed, outcomes]))
"""


@pytest.mark.parametrize("room", LEAVES)
def test_the_rest_stands_without_it(room, tmp_path):
    copy, gone = tmp_path / "retentive", GONE.get(room, [])
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (room, *WITH_IT[room]):
        (shutil.rmtree if (copy / name).is_dir() else os.remove)(copy / name)
    for name in ("text", "tasks"):
        (tmp_path / name).mkdir()
    for n in range(6):
        line = f"The café number {n} has a view of the river.\n"
        (tmp_path / "text" / f"{n}.txt").write_text(line * 8, encoding="utf-8")
    (tmp_path / "tasks" / "lambada_openai.jsonl").write_text('{"text": "The river has a view"}\n', encoding="utf-8")

    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", WITHOUT, json.dumps(gone)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    failed, outcomes = json.loads(done.stdout.splitlines()[-1])
    assert failed == {}
    assert len(outcomes) == 4 + len(gone)
    for command, (code, out, err) in outcomes.items():
        if command.split() in gone:
            assert code == 2 and out == "" and err.startswith("retentive: ") and err.count("\n") == 1, (command, err)
        else:
            assert code == 0, (command, err)
    assert "acc" in outcomes["eval run"][1] and outcomes["generate run"][1]
