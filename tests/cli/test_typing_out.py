"""Parts that commands for a model share: prompts that are not text, and names in the usage."""

import io
import os
import subprocess
import sys

import pytest
import tyro

from retentive.cli.convert import ConvertCommand
from retentive.cli.eval import EvalCommand
from retentive.cli.generate import GenerateCommand
from retentive.cli.info import InfoCommand
from retentive.cli.memory import VERBS
from retentive.cli.typing_out import prompt_text, type_out

COMMANDS = {"generate": GenerateCommand, "eval": EvalCommand, "info": InfoCommand, "convert": ConvertCommand}


def test_a_prompt_is_what_it_is_or_standard_input(monkeypatch):
    assert prompt_text("a café") == "a café"
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines"))
    assert prompt_text("-") == "two\nlines"


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_bytes_on_standard_input_are_refused(errors, monkeypatch, refuses):
    """In the C locale Python decodes them all the same, to lone surrogates that no tokenizer knows."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xff\x80"), encoding="utf-8", errors=errors))
    with refuses("standard input is not UTF-8 text"):
        prompt_text("-")
    with refuses("the prompt is not UTF-8 text"):
        prompt_text("a\udcff")


@pytest.mark.parametrize(
    "way", ["piped", *(pytest.param(way, marks=pytest.mark.slow) for way in ("by position", "from a file"))]
)
def test_a_prompt_without_its_option(way, tmp_path):
    argv = [sys.executable, "-m", "retentive", "generate", "novels", "--max-tokens", "2", "--temperature", "0"]
    (tmp_path / "prompt").write_text("The old house")
    if way == "from a file":
        with (tmp_path / "prompt").open() as file:
            done = subprocess.run(argv, stdin=file, capture_output=True, text=True, check=True)
    else:
        how = {"input": "The old house"} if way == "piped" else {"stdin": subprocess.DEVNULL}
        argv += [] if way == "piped" else ["The old house"]
        done = subprocess.run(argv, capture_output=True, text=True, check=True, **how)
    assert done.stdout.startswith("The old house")


def test_a_pipe_that_nobody_writes_to_is_left_alone():
    argv = [sys.executable, "-c", "from retentive.cli.typing_out import piped; print([piped()])"]
    read, write = os.pipe()
    try:
        done = subprocess.run(argv, stdin=read, capture_output=True, text=True, check=True, timeout=60)
    finally:
        os.close(read)
        os.close(write)
    assert done.stdout == "['']\n"


@pytest.mark.parametrize("name", [*COMMANDS, *VERBS])
def test_the_usage_names_what_is_wanted(name, capsys):
    with pytest.raises(SystemExit):
        tyro.cli((COMMANDS | VERBS)[name], args=["--help"])
    usage = capsys.readouterr().out.split("\n\n")[0].split("\n╭")[0]
    assert any(word in usage for word in ("RUN", "FILE")) and "STR" not in usage


def test_an_error_has_a_line_of_its_own_and_no_prompt_before_it(capsys):
    with pytest.raises(ArithmeticError):
        type_out("Once", (" upon" if n else 1 / n for n in (1, 0)))
    assert capsys.readouterr().out == "Once upon\n"
    with pytest.raises(ArithmeticError):
        type_out("Once", (1 / 0 for _ in "a"))
    assert capsys.readouterr().out == ""
    type_out("Once", iter(()))
    assert capsys.readouterr().out == "Once\n"
