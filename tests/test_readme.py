"""README.md: its commands and Python run unchanged (with fewer training steps); its figures match results/."""

import contextlib
import importlib
import io
import re
import shlex
from pathlib import Path

import pytest

from retentive.cli import main
from retentive.report.sections import PAPER

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FEWER = ["--steps", "4", "--batch", "2", "--length", "64", "--eval-every", "2", "--eval-tokens", "300"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("figures")


def test_commands_and_python(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    texts = tmp_path / "my_texts"
    texts.mkdir()
    for n in range(12):
        (texts / f"{n}.txt").write_text(f"Once upon a time, {n} foxes lived in a wood. " * 40, encoding="utf-8")

    lines = [line.split("#")[0] for block in blocks("sh") for line in block.splitlines()]
    verbs = [shlex.split(line)[1:] for line in lines if line.startswith("retentive ")]
    assert [words[0] for words in verbs] == ["data", "train", "generate"]
    more = {"data": ["--vocab-size", "300"], "train": FEWER, "generate": []}
    for words in verbs:
        main([*words, *more[words[0]]])
    assert "held-out" in capsys.readouterr().err

    ((code, output),) = re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue().splitlines()[-1] == output.splitlines()[-1]  # the lines before are from another model


def test_figures_are_those_of_results(figures):
    assert figures.stale() == [], "run: python docs/figures.py"
    assert [m[2] for m in figures.BLOCK.finditer(README)] == ["picture", "claims", "limits"]


def test_the_check_of_figures_sees_one_that_is_off(figures, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "PAGES", ("README.md",))
    figure = re.search(r"\d\.\d+", figures.BLOCK.search(README)[3])[0]
    (tmp_path / "README.md").write_text(README.replace(figure, "9.9", 1), encoding="utf-8")
    assert figures.stale() == ["README.md: picture"]


def test_figures_of_others_are_those_of_the_report():
    for figure in re.search(r"perplexity of ([\d.]+\d) and the Transformer ([\d.]+\d)", README).groups():
        assert any(figure in text for text in PAPER.values()), figure


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_lead_somewhere(link):
    assert link.startswith("https://") or (ROOT / link).exists(), link


def test_the_files_to_read_first_are_about_a_thousand_lines():
    section = README.split("## Read the code")[1].split("A notebook")[0]
    files = [ROOT / link for link in re.findall(r"\]\(([^)#]+)\)", section)]
    assert [file.name for file in files[:3]] == ["minimal.py", "idea.md", "reference.py"]
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files) < 1100


def test_it_is_short():
    assert len(README.splitlines()) <= 120
