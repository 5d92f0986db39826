"""`--window` and `--sinks` of every verb that opens a model, against a folder that `convert` stored with them."""

import json
from pathlib import Path

import pytest
import torch

import retentive
from retentive.checkpoint import save_model
from retentive.cli import main
from retentive.data.tokenizer import ByteTokenizer
from retentive.models import build, retnet, transformer

LIMITS = ["--window", "6", "--sinks", "2"]


@pytest.fixture
def folders(tmp_path, monkeypatch, capsys):
    """whole/, a Transformer; short/, what `convert` makes of it; both in the working directory, with a text."""
    monkeypatch.chdir(tmp_path)
    model = build(transformer(vocab_size=257, dim=32, layers=2, heads=2, kv_heads=1)).eval()
    with torch.no_grad():
        for p in model.blocks.parameters():
            p.mul_(4 if p.ndim == 2 else 1)
    save_model("whole", model, ByteTokenizer())
    save_model("retnet", build(retnet(vocab_size=257, dim=32, layers=2, heads=2)), ByteTokenizer())
    Path("perplexity.jsonl").write_text(json.dumps({"text": "a river and a bridge. " * 20}) + "\n")
    Path("text.txt").write_text("a river and a bridge. " * 20)
    main(["convert", "whole", "short", *LIMITS])
    capsys.readouterr()


def said(argv, capsys):
    main(argv)
    return capsys.readouterr().out


def test_convert_stores_the_window(folders):
    (model, _), (whole, _) = retentive.load("short"), retentive.load("whole")
    assert (model.config.windows, model.config.sinks) == ((8, 8), (2, 2))
    assert all(map(torch.equal, model.parameters(), whole.parameters()))


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_generate_and_eval_see_as_much_as_in_the_stored_model(engine, folders, capsys):
    for verb in (
        ["generate", "--prompt", "a river and a bridge, " * 3, "--temperature", "0", "--max-tokens", "30"],
        ["eval", "--tasks", "perplexity", "--data", ".", "--text-window", "64"],
    ):
        verb = [*verb, "--engine", engine]
        whole, short, limited = (
            said([verb[0], *who, *verb[1:]], capsys) for who in (["whole"], ["short"], ["whole", *LIMITS])
        )
        assert limited == short != whole


def test_a_memory_file_of_one_fits_the_other(folders, capsys):
    said(["memory", "write", "whole", "text.txt", "--out", "text.mem", *LIMITS], capsys)
    ask = ["--memory", "text.mem", "--prompt", "and", "--max-tokens", "9", "--temperature", "0"]
    assert said(["memory", "ask", "whole", *LIMITS, *ask], capsys) == said(["memory", "ask", "short", *ask], capsys)
    with pytest.raises(SystemExit):
        main(["memory", "ask", "whole", *ask])
    assert "with the same --dtype, --window and --sinks" in capsys.readouterr().err


def test_info_shows_the_window_and_its_memory(folders, capsys):
    shown = said(["info", "whole", *LIMITS], capsys)
    assert shown.replace("whole", "short") == said(["info", "short"], capsys)
    assert "window=6  sinks=2" in shown
    (row,) = (line for line in shown.splitlines() if "│ KV cache" in line)
    assert row.count("1.0 kB") == 5  # 2 layers, 8 tokens, 2 x 16 numbers of 2 bytes
    assert "window=8" in said(["info", "transformer", "--window", "8"], capsys)


def test_exports_hold_it(folders, capsys):
    main(["export", "whole", "--to", "native", "--out", "c", *LIMITS])
    (block,) = json.loads(Path("c/model/config.json").read_text())["config"]["blocks"]
    assert (block["mixer"]["window"], block["mixer"]["sinks"]) == (6, 2)


BAD = {
    "sinks": (
        ["generate", "whole", "--sinks", "4"],
        "--sinks 4: without a window all tokens are seen; give --window too",
    ),
    "retnet": (
        ["convert", "retnet", "new", "--window", "8"],
        "--window 8: a RetNet has no attention to limit; leave it out",
    ),
    "larger": (["eval", "short", "--tasks", "piqa", "--window", "7"], "--window 7: the model has a window of 6"),
    "number": (["chat", "whole", "--window", "many"], "--window many: expected a whole number"),
    "onnx": (
        ["export", "whole", "--to", "onnx", "--out", "new", *LIMITS],
        "a model with attention sinks has no ONNX graph: export it to native or browser",
    ),
    "info": (["info", "5m", "--window", "8"], "--window 8: a RetNet has no attention to limit"),
}


@pytest.mark.parametrize("name", BAD)
def test_one_line_says_what_is_wrong(name, folders, capsys):
    argv, words = BAD[name]
    with pytest.raises(SystemExit) as stop:
        main(argv)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and words in lines[0]
    assert not Path("new").exists()
