"""`retentive.evaluate`: one call for all ways of scoring, by a model or by its folder."""

import json

import pytest
import torch

import retentive
from retentive.checkpoint import save_model
from retentive.data.tokenizer import ByteTokenizer
from retentive.evals.contexts import score_contexts
from retentive.evals.likelihood_tasks import score_likelihood_tasks
from retentive.models import build, retnet


@pytest.fixture
def run(tmp_path):
    """The folder of a run, with data/ beside it."""
    save_model(tmp_path / "run", build(retnet(vocab_size=257, dim=16, layers=1, heads=2)), ByteTokenizer())
    (tmp_path / "data").mkdir()
    rows = [{"goal": "g", "sol1": "red", "sol2": "blue", "label": n % 2} for n in range(4)]
    (tmp_path / "data/piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "data/perplexity.jsonl").write_text(json.dumps({"text": "some text " * 9}), encoding="utf-8")
    return tmp_path / "run"


def test_a_model_and_its_folder_give_the_same_as_the_scorers(run):
    data = run.parent / "data"
    model, tokenizer = retentive.load(run)
    want = score_likelihood_tasks(model, tokenizer, ["piqa", "perplexity"], data, limit=3, text_window=16)
    for found in (
        retentive.evaluate(model, ["piqa", "perplexity"], data, tokenizer=tokenizer, limit=3, text_window=16),
        retentive.evaluate(str(run), "piqa, perplexity", str(data), limit=3, text_window=16),
    ):
        assert tuple(found) == want
        assert str(found).splitlines()[2].startswith("| piqa | 0 | 3 | acc | ")
    found = retentive.evaluate(run, "perplexity", data, contexts=[30, 60], last=8)
    assert tuple(found) == score_contexts(model, tokenizer, ["perplexity"], data, [30, 60], last=8)
    assert str(found).splitlines()[0].startswith("| task | context |")


REFUSED = {
    "no-data": (dict(tasks="piqa"), "`data` is needed: the folder that holds piqa.jsonl"),
    "shots-by-context": (dict(tasks="perplexity", contexts=[30], shots=1), "leave out `shots`"),
    "contexts-in-lm-eval": (dict(tasks="piqa", contexts=[30], lm_eval=True), "leave them out with `lm_eval`"),
    "a-window-of-nothing": (dict(tasks="piqa", data="data", text_window=0), "`text_window=0`: must be at least 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_exclude_each_other(case, run, monkeypatch, refuses):
    options, words = REFUSED[case]
    monkeypatch.chdir(run.parent)
    with refuses(words):
        retentive.evaluate(run, **options)


def test_a_model_needs_its_tokenizer(run, refuses):
    model, tokenizer = retentive.load(run)
    with refuses("`tokenizer` is needed beside a model"):
        retentive.evaluate(model, "piqa", run.parent / "data")
    given = retentive.evaluate(run, "piqa", run.parent / "data", tokenizer=tokenizer)  # beside a folder it may be given
    assert given == retentive.evaluate(model, "piqa", run.parent / "data", tokenizer=tokenizer)


@pytest.mark.parametrize("how", [dict(tasks="piqa"), dict(tasks="perplexity"), dict(tasks="passkey", contexts=[400])])
def test_weights_of_nan_have_no_score(how, run, refuses):
    """The argmax of NaN is choice 0, which would pass for an answer."""
    model, tokenizer = retentive.load(run)
    with torch.no_grad():
        model.blocks[0].retention.k_proj.weight.fill_(float("nan"))
    with refuses("the model's logits are not finite", ArithmeticError):
        retentive.evaluate(model, data=run.parent / "data", tokenizer=tokenizer, **how)
