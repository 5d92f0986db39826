"""Errors, remarks and log lines on the command line: options in backticks become flags, all else stays."""

import json
import logging
from pathlib import Path

import pytest

from retentive import cli
from retentive.cli.errors import described, flags, one_line
from retentive.cli.progress import say
from retentive.files import load_tensors
from retentive.options import option, quoted


@pytest.mark.parametrize(
    ("text", "typed"),
    [
        ("`data` is needed", "--data is needed"),
        ("`max_length` and `lm_eval=True`", "--max-length and --lm-eval"),
        ("leave it, or `half_life=False`", "leave it, or --no-half-life"),
        (f"{option('mode', 'whole')}: no", "--mode whole: no"),
        (f"{option('contexts', (512, 1024))}: no", "--contexts 512 1024: no"),
        (f"{option('contexts', ())}: no", "--contexts none: no"),
        (f"{option('set', {'dim': 64, 'decay': 'paper'})}: no", "--set dim=64 decay=paper: no"),
        (f"{option('data', (Path('a'), Path('b c')))}: no", "--data a b c: no"),
        (f"{option('seed', -1)}, {option('lr', 2.5e-3)}", "--seed -1, --lr 0.0025"),
        ("`template=FILE`, `tokenizer=NAME`", "--template FILE, --tokenizer NAME"),
    ],
)
def test_options_become_flags(text, typed):
    assert flags(text) == typed


@pytest.mark.parametrize(
    "text",
    [
        "expected a file of `retentive memory write`, or `retentive compare --json FILE`",
        "run `wandb login`: `a.b`, `LanguageModel`, `State(memories)`, `_x`, `x()`, `/save`, `CC=clang`",
        "no quotation marks around batch=8 or --batch 8, and one ` alone",
        "```",
    ],
)
def test_commands_and_code_stay(text):
    assert flags(text) == text


@pytest.mark.parametrize(
    ("verb", "text", "typed"),
    [
        ("sft", "`init` and `out`", "RUN and --out"),
        ("sft", option("init", "runs/mine"), "RUN runs/mine"),
        ("train", "`init`", "--init"),
        ("memory", "`sources` is empty", "FILES is empty"),
        ("data", "`sources` is empty", "SOURCES is empty"),
        ("convert", option("adapter", Path("runs/mine")), "--merge runs/mine"),
        ("generate", option("adapter", Path("runs/mine")), "--adapter runs/mine"),
    ],
)
def test_a_field_that_a_verb_calls_otherwise(verb, text, typed):
    assert flags(text, verb) == typed


def test_another_librarys_message_keeps_its_backticks(tmp_path):
    """Parsers of JSON in Rust write "missing field `dtype`": a field of a file, no option."""
    header = json.dumps({"a": {}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError) as ours:  # what the library said, within our own message
        load_tensors(tmp_path / "x.safetensors")
    assert "missing field 'dtype'" in described(ours.value)
    with pytest.raises(ValueError) as theirs:
        exec(compile("raise ValueError('name the `batch`')", "/site-packages/other.py", "exec"))
    assert described(theirs.value) == "name the `batch`"
    assert quoted("a `b`\n  c") == "a 'b' c"


def test_an_error_ends_in_one_line_of_printable_text(capsys, monkeypatch):
    monkeypatch.delenv("RETENTIVE_DEBUG", raising=False)
    with pytest.raises(SystemExit) as end, one_line("data"):
        cli.run(["no\x1b[1m\nverb"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("retentive: unknown command") and said.count("\n") == 1 and "\x1b" not in said


def test_remarks_and_warnings_name_flags(capsys, monkeypatch):
    log = logging.getLogger("retentive")
    for name in ("handlers", "level"):
        monkeypatch.setattr(log, name, getattr(log, name))
    cli.show_log()
    say("; `suffix` reads more kinds")
    logging.getLogger("retentive.checkpoint").warning("%s: `resume=True` goes on", "runs/mine")
    logging.getLogger("retentive.ops").info("compiling")  # shown at terminals only
    assert capsys.readouterr().err == "; --suffix reads more kinds\nretentive: runs/mine: --resume goes on\n"
