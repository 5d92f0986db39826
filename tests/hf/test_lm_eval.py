"""lm-eval's own class for transformers gives our models the scores of this package."""

import json

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'retentive[eval]'")
pytest.importorskip("accelerate", reason="lm-eval's class for transformers needs accelerate: pip install 'lm-eval[hf]'")

import datasets
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

import retentive
from retentive.evals.harness import describe
from retentive.evals.likelihood_tasks import score_likelihood_tasks
from tests.evals.task_rows import variants
from tests.export.variants import peaked

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of other packages
TASKS = ["piqa", "hellaswag", "lambada_openai"]


def test_scores_are_ours(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    (tmp_path / "tasks").mkdir()
    for name in TASKS:
        text = "".join(json.dumps(row) + "\n" for row in variants(name))
        (tmp_path / "data" / f"{name}.jsonl").write_text(text, encoding="utf-8")
    folder = exported(peaked())
    _, records = score_likelihood_tasks(*retentive.load(folder), TASKS, tmp_path / "data")
    describe(TASKS, tmp_path / "data", tmp_path / "tasks")
    words = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    theirs = HFLM(AutoModelForCausalLM.from_pretrained(folder), tokenizer=words, add_bos_token=True, batch_size=4)
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    found = simple_evaluate(model=theirs, tasks=TASKS, bootstrap_iters=0, task_manager=manager)
    for name in TASKS:
        own = [record["logprobs"] for record in records if record["task"] == name]
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        assert len(own) == len(samples) == 5
        for mine, sample in zip(own, samples, strict=True):
            assert mine == pytest.approx([logprob for logprob, _ in sample["filtered_resps"]], abs=1e-3)
