"""Reading prompts: rows against the formulas, the correctness gate, the table and the picture."""

import json

import pytest

from retentive.bench import prefill
from retentive.bench.lab import llamacpp, models, plot
from retentive.bench.prefill import Options
from retentive.models import LanguageModel, cost, retnet

CONFIG = retnet(vocab_size=31, dim=32, layers=2, heads=4)


@pytest.fixture(autouse=True)
def made_up(sizes, rates):
    """A tiny size, and a machine whose rates are known."""


def measured(**changes):
    how = dict(size="tiny", vocab_size=31, lengths=(16, 8), precision="fp32", repeats=1, device="cpu")
    return prefill.measure(Options(**{**how, **changes}))


def test_rows_tables_and_pictures(tmp_path, lines):
    result = measured(precision="bf16")
    assert json.loads(json.dumps(result)) == result
    assert [row["length"] for row in result["rows"]] == [8, 16]
    for row in result["rows"]:
        for name in result["parameters"]:
            found, config = row["models"][name], models.config_of(name, CONFIG)
            config = llamacpp.rounded(config) if name in models.LLAMACPP else config
            flops = cost.mean_flops_per_token(config, row["length"]) - 2 * config.vocab_size * config.dim
            assert found["fraction"] == pytest.approx(flops * found["tokens_per_second"] / 1e12)
    _, _, first, _ = prefill.table(result).splitlines()
    ours, twins = (result["rows"][0]["models"][name]["tokens_per_second"] for name in ("retnet", "transformer"))
    assert first.startswith(f"| 8 | {ours:,.0f} | {twins:,.0f} |") and f" | {ours / twins:.2f}x | " in first
    prefill.plot(result, tmp_path / "a.png", title="t")
    drawn = [row["models"]["retnet"]["tokens_per_second"] for row in result["rows"]]
    assert len(lines) == min(plot.MOST, len(result["parameters"])) >= 3 and lines["RetNet"] == [([8, 16], drawn)]


def test_a_model_that_decodes_wrongly_is_not_timed(monkeypatch, never_timed, refuses):
    real = LanguageModel.hidden

    def wrong(self, ids, state=None, **how):
        x, state = real(self, ids, state, **how)
        return (1.1 * x if ids.shape[1] == 1 and self.config.attends else x), state

    monkeypatch.setattr(LanguageModel, "hidden", wrong)
    with refuses("Transformer decodes logits that are off by", ArithmeticError):
        measured()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (dict(precision="fp8"), "unknown precision 'fp8'"),
        (dict(models=("retnet", "llama")), "unknown model 'llama'"),
        (dict(models=("transformer",)), "`models=('transformer',)`: retnet is missing"),
        (dict(repeats=0), "`repeats=0`: must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(how, words, never_timed, refuses):
    with refuses(words):
        measured(**how)
