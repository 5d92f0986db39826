"""`bench speculation`: counts guesses, detects different tokens, and reports a line for every step."""

import json

import pytest
import torch

from benchmarks import speculation
from benchmarks.speculation import Options
from retentive.checkpoint import save_model
from retentive.data.tokenizer import ByteTokenizer
from retentive.models import build, retnet


@pytest.fixture
def model():
    """Peaked enough that no two tokens are equally likely."""
    out = build(retnet(vocab_size=257, dim=16, layers=2, heads=2)).eval()
    for p in out.parameters():
        torch.nn.init.normal_(p, std=2 * p.shape[-1] ** -0.5) if p.ndim == 2 else None
    return out


def test_it_counts_what_was_guessed(model):
    said = []
    options = Options("run", (), most=(2,), tokens=12, repeats=1)
    result = speculation.of_models(model, [[1, 2, 3] * 5, [4, 5]], options, draft=model, say=said.append)
    rows = {row["way"]: row for row in result["rows"]}
    assert set(rows) == {"plain", "look-up", "draft"} and rows["plain"]["tokens_per_call"] == 1
    assert rows["plain"]["over_plain"] == 1
    # the model guesses itself: three tokens a call, after the first one and but for the last call
    assert 24 / 10 <= rows["draft"]["tokens_per_call"] <= 3 and rows["draft"]["guesses_right"] > 0.75
    assert "| draft | 2 |" in speculation.table(result)
    ways = ["plain", "look-up with 2 guesses", "draft with 2 guesses"]
    assert [line.split(":")[0] for line in said] == ways * 2 and "24 tokens in" in said[0]


def test_the_gate_sees_other_tokens(model, monkeypatch, refuses):
    monkeypatch.setattr(speculation, "speculate", lambda *args, **how: iter(()))
    with refuses("look-up with 2 guesses gave other tokens", ArithmeticError):
        speculation.of_models(model, [[1, 2]], Options("run", (), most=(2,), tokens=3, repeats=1))


def test_models_and_texts_are_read_from_files(model, tmp_path, monkeypatch):
    save_model(tmp_path / "run", model, ByteTokenizer())
    (tmp_path / "text").write_text("abcabcabcabc", encoding="utf-8")
    run, texts = str(tmp_path / "run"), (tmp_path / "text",)
    result = speculation.measure(Options(run, texts, draft=run, tokens=9, repeats=1, most=(2,), prompt=5))
    assert json.loads(json.dumps(result)) == result and (result["texts"], result["tokens"]) == (1, 9)
    assert [row["way"] for row in result["rows"]] == ["plain", "look-up", "draft"]
    seen = {}
    monkeypatch.setattr(speculation, "of_models", lambda model, texts, *_, **__: seen.update(texts=texts))
    speculation.measure(Options(run, texts, prompt=5))
    assert seen["texts"] == [list(b"abcab")]


def test_no_text_is_no_measurement(refuses):
    with refuses("no text given: python -m benchmarks speculation RUN FILES"):
        speculation.measure(Options("run", ()))
