"""The README's own commands and Python, run as they stand there, in order, in one folder (training fewer steps)."""

import io
import re
import shlex
from pathlib import Path

import pytest

from retentive.cli import main

README = Path(__file__).parents[1] / "README.md"
FEWER = ["--steps", "4", "--size", "1m", "--batch", "2", "--length", "64", "--eval-every", "2", "--eval-tokens", "300"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def shortened(words: list[str]) -> list[str]:
    """Training with fewer steps, `data` with a vocabulary that a short text gives; the flags the README names stay."""
    if words[0] == "data":
        return [*words, "--vocab-size", "300"]
    if words[0] == "train":
        return [w for w in words if w not in ("--size", "5m")] + FEWER
    if words[0] == "compare":
        return [*words, *FEWER[:2], *FEWER[4:], "--sizes", "1m", "--seeds", "0"]
    return words


def test_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    texts = tmp_path / "my_texts"
    texts.mkdir()
    for n in range(12):
        (texts / f"{n}.txt").write_text(f"Once upon a time, {n} foxes lived in a wood. " * 40, encoding="utf-8")

    commands = [line.split("#")[0] for block in blocks("sh") for line in block.splitlines()]
    verbs = [shlex.split(c)[1:] for c in commands if c.startswith("retentive ")]
    wanted = ["data", "train", "generate", "info", "eval", "compare", "serve", "chat", "memory", "memory"]
    wanted += ["convert", "info"]
    assert [v[0] for v in verbs] == wanted
    monkeypatch.setattr("sys.stdin", io.StringIO("Who lived in the wood?\n"))
    for words in verbs:
        if words[0] not in ("eval", "serve"):  # files of the field, an end by a signal: see their own tests
            main(shortened(words))
    assert "held-out" in capsys.readouterr().out

    python = blocks("python")
    assert len(python) == 2
    for code in python:
        exec(compile(code, "README.md", "exec"), {})
    assert Path("once.safetensors").is_file()


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8")))
def test_links_lead_somewhere(link):
    assert link.startswith("https://") or (README.parent / link).exists(), link


def test_first_hour_is_under_a_thousand_lines():
    paths = [
        "docs/idea.md",
        "retentive/ops/reference.py",
        "retentive/layers/retention.py",
        "retentive/models/retnet.py",
    ]
    paths += ["retentive/models/retnet.py", "retentive/train/loop.py", "retentive/infer/generate.py"]
    assert sum(len((README.parent / p).read_text(encoding="utf-8").splitlines()) for p in paths) < 1000
