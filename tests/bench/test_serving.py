"""The serving benches: gates that see wrong tokens, counts that are right, tables of the numbers."""

import json

import pytest
import torch

from retentive.bench import serving, speculation
from retentive.checkpoint import save_model
from retentive.cli import main
from retentive.data.tokenizer import ByteTokenizer
from retentive.infer.engine import Engine
from retentive.models import RetNetConfig, build, twin

CONFIG = RetNetConfig(vocab_size=257, dim=16, layers=2, heads=2)


def model(config=CONFIG):
    out = build(config).eval()
    for p in out.parameters():
        torch.nn.init.normal_(p, std=2 * p.shape[-1] ** -0.5) if p.ndim == 2 else None
    return out


@pytest.mark.parametrize("config", [CONFIG, twin(CONFIG)], ids=["retnet", "transformer"])
def test_a_small_run_measures_everything(config):
    result = serving.measure(
        model(config), streams=3, tokens=5, prompt=40, long=150, repeats=2,
        server=lambda model, streams, tokens: {
            "tokens_per_second": {"server": {"median": 100.0 * streams}},
            "server_over_engine": 0.95,
        },
    )  # fmt: skip
    assert all(0 < r["least"] <= r["median"] <= r["most"] for r in result["tokens_per_second"].values())
    assert result["miss_over_hit"] > 0 and result["server"]["tokens_per_second"]["server"]["median"] == 300
    early, late = result["long_stream"]["at"]
    assert (early["tokens"], late["tokens"]) == (100, 150)
    grown = late["state"] > early["state"]
    assert grown == (config is not CONFIG), "a state does not grow, a cache does"
    shown = serving.table(result)
    assert f"{result['streams_over_one']:.2f} times one stream" in shown and "by HTTP" in shown and "| 150 |" in shown


def test_the_gate_sees_tokens_of_another_stream(monkeypatch):
    def mixed(engine, row, token, *logprobs, take=Engine._take):
        take(engine, row, (token + (row == 1)) % 257, *logprobs)

    monkeypatch.setattr(Engine, "_take", mixed)
    with pytest.raises(ArithmeticError, match="gave other tokens than alone: not timed"):
        serving.measure(model(), streams=3, tokens=5, prompt=10, long=0, repeats=1)


def test_the_bare_step_is_the_models_own(monkeypatch):
    called, one = [], model()
    hidden = one.hidden
    monkeypatch.setattr(one, "hidden", lambda ids, state: called.append(ids.shape) or hidden(ids, state))
    serving.bare(one, 4, 6)
    assert called == [(4, 1)] * 6


def test_speculation_counts_what_was_guessed():
    one = model()
    result = speculation.measure(one, [[1, 2, 3] * 5, [4, 5]], draft=one, most=(2,), tokens=12, repeats=1)
    rows = {row["way"]: row for row in result["rows"]}
    assert set(rows) == {"plain", "look-up", "draft"} and rows["plain"]["tokens_per_call"] == 1
    # the model guesses itself: three tokens a call, after the first one and but for the last call
    assert 24 / 10 <= rows["draft"]["tokens_per_call"] <= 3 and rows["draft"]["guesses_right"] > 0.75
    assert "| draft | 2 |" in speculation.table(result)


def test_the_gate_of_speculation_sees_other_tokens(monkeypatch):
    monkeypatch.setattr(speculation, "speculate", lambda *args, **how: iter(()))
    with pytest.raises(ArithmeticError, match="look-up with 2 guesses gave other tokens"):
        speculation.measure(model(), [[1, 2]], most=(2,), tokens=3, repeats=1)


def test_the_commands(tmp_path, capsys):
    argv = ["bench", "serving", "--size", "1m", "--vocab-size", "300", "--streams", "2", "--tokens", "3"]
    main([*argv, "--prompt", "20", "--long", "0", "--repeats", "1", "--json", str(tmp_path / "a.json")])
    assert "2 streams" in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text())["command"].startswith("retentive bench serving --size 1m")
    save_model(tmp_path / "run", model(), ByteTokenizer())
    (tmp_path / "text").write_text("abcabcabcabc")
    argv = ["bench", "speculation", str(tmp_path / "run"), str(tmp_path / "text"), "--draft", str(tmp_path / "run")]
    main([*argv, "--tokens", "9", "--repeats", "1", "--most", "2", "--json", str(tmp_path / "b.json")])
    assert "look-up" in capsys.readouterr().out
    assert {row["way"] for row in json.loads((tmp_path / "b.json").read_text())["rows"]} == {
        "plain",
        "look-up",
        "draft",
    }
