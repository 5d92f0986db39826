"""The model that comes with the package: found by its name anywhere, small, and able to read English."""

import math
from pathlib import Path

import pytest
import torch

import retentive
from retentive.checkpoint import save_model
from retentive.checkpoint.find import SHIPPED, find, shipped
from retentive.cli import main
from retentive.data.tokenizer import ByteTokenizer
from retentive.models import build, retnet

NAMES = shipped()
TEXT = "She had been so long in the old house by the river that she could not think of leaving it without tears."


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_found_by_its_name_and_has_learnt_english(name):
    model, tokenizer = retentive.load(name)
    ids = torch.tensor([tokenizer.encode("\n\n" + TEXT)])
    with torch.no_grad():
        logits, _ = model(ids)
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
    # a sentence of its kind: one that knows nothing takes 12 bits a token, which is 3.4 a byte here
    assert float(loss) / math.log(2) / len(TEXT.encode()) < 1.8


def test_a_name_that_is_none_says_which_is_one(refuses):
    with refuses("no model folder at novel: expected a run directory, a model folder", FileNotFoundError):
        find("novel")


def test_names_of_folders_come_first(tmp_path):
    save_model(tmp_path / "novels", build(retnet(dim=32, layers=1, heads=2)), ByteTokenizer())
    assert find("novels") == Path("novels")
    assert find("./novels") == Path("novels")


@pytest.mark.parametrize("name", ["novel", "shipped/novels", "./novels", "Novels"])
def test_other_names_are_not_there(name, refuses):
    with refuses("no model folder at", FileNotFoundError):
        find(name)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_small_and_has_a_card(name):
    folder = NAMES[name]
    # in the package; in the repository, one file that GitHub takes
    sizes = [file.stat().st_size for file in folder.iterdir()]
    assert sum(sizes) <= 8e6 if folder.parent == SHIPPED else max(sizes) <= 95e6  # hosts of repositories limit a file
    card = (folder / "README.md").read_text(encoding="utf-8")
    for word in ("## Data", "## Numbers", "## Limits", "Licence"):
        assert word in card, word


def test_the_command_line_writes_with_it(capsys):
    main(["generate", "novels", "--prompt", "The old house", "--max-tokens", "24", "--temperature", "0"])
    assert len(capsys.readouterr().out.split()) > 10
