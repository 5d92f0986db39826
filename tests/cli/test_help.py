"""`--help` of every verb: each option has its text in one paragraph, and it names what there is."""

import importlib
import os
import subprocess
import sys
from dataclasses import dataclass, fields, is_dataclass

import pytest

from retentive.bench import BENCHES
from retentive.checkpoint.find import shipped
from retentive.cli import VERBS, main, memory
from retentive.cli.parsing import docstrings, join_help
from retentive.export.folder import FILES

CALLS = [[verb] for verb in VERBS if verb not in ("bench", "memory")]
CALLS += [["bench", name] for name in BENCHES] + [["memory", verb] for verb in memory.VERBS]


def helped(argv: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as end:
        main([*argv, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def texts(module: str) -> list[str]:
    """Returns the docstrings of several lines below the fields of dataclasses in a module."""
    kinds = [
        kind for kind in vars(importlib.import_module(module)).values() if isinstance(kind, type) and is_dataclass(kind)
    ]
    return [text for kind in kinds for base in kind.__mro__[:-1] for text in docstrings(base).values() if "\n" in text]


@pytest.mark.parametrize("argv", CALLS, ids=" ".join)
def test_every_verb_has_help(argv, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2000")
    shown = helped(argv, capsys)
    assert shown.startswith(f"usage: retentive {' '.join(argv)} ")
    module = BENCHES[argv[1]] if argv[0] == "bench" else VERBS[argv[0]][0]
    lines = shown.splitlines()
    for text in texts(module):
        joined = " ".join(text.split())
        assert joined[:60] not in shown or any(joined in line for line in lines), joined


@pytest.mark.parametrize("verb", ["train", "completion", "memory write"])
def test_a_description_of_several_lines_is_one_paragraph(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2000")
    described = helped(verb.split(), capsys).splitlines()[2:4]
    assert described[0].endswith(".") and described[0].count(" ") > 20 and described[1] == ""


def test_a_docstring_of_several_lines_is_one_paragraph():
    @dataclass
    class Inner:
        x: int = 1
        """Below,
        on two lines."""

    @dataclass
    class Outer:
        y: int = 2
        """One line."""
        z: int = 3
        inner: Inner | None = None

    Outer.__annotations__["inner"] = Inner
    join_help(Outer)
    assert {f.name: f.metadata.get("help") for f in (*fields(Outer), *fields(Inner))} == {
        "y": "One line.", "z": None, "inner": None, "x": "Below, on two lines.",
    }  # fmt: skip


def test_help_names_shipped_models_and_all_targets_of_export(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2000")
    assert shipped()
    for verb in ("generate", "chat", "serve", "eval", "export", "convert", "info"):  # not quantised again, nor trained
        assert all(name in helped([verb], capsys) for name in shipped()), verb
    said = VERBS["export"][1].lower()
    names = {"onnx": "onnx", "native": "c sources", "browser": "web page", "gguf": "gguf"}
    assert set(names) == set(FILES) and all(word in said for word in names.values())


def test_the_list_of_verbs_needs_no_torch():
    code = "import sys\nfrom retentive.cli import main\nmain(['--help'])\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines()[2:]] == list(VERBS)
