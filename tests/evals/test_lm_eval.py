"""lm-eval's own tasks: our scorer, our lm-eval class, and a class that reads each row whole agree."""

import json

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'retentive[eval]'")

import datasets
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from retentive.checkpoint import save_model
from retentive.cli import main
from retentive.evals.harness import describe, native, rolling, run_tasks
from retentive.evals.likelihood_tasks import score_likelihood_tasks, windows
from tests.evals.task_rows import ROWS, variants

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of other packages

TASKS = list(ROWS)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files of all tasks, five rows each."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for name in TASKS:
        text = "".join(json.dumps(row) + "\n" for row in variants(name))
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


class Plain(TemplateLM):
    """The minimum lm-eval needs: every row is read whole and alone; lm-eval splits prompts and continuations."""

    def __init__(self, model, tokenizer):
        super().__init__()
        self.model, self.bytes = model, tokenizer

    @property
    def eot_token_id(self):
        return self.bytes.eos_id

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        return [*([] if add_special_tokens is False else [self.bytes.eos_id]), *self.bytes.encode(string)]

    def _loglikelihood_tokens(self, requests, **kwargs):
        answers = []
        for _, context, continuation in requests:
            ids = torch.tensor([context + continuation])
            with torch.no_grad():
                logits = self.model(ids)[0][0, len(context) - 1 : -1]
            target = ids[0, len(context) :]
            logprob = float(logits.log_softmax(-1).gather(1, target[:, None]).sum())
            answers.append((logprob, bool((logits.argmax(-1) == target).all())))
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError

    def generate_until(self, requests, disable_tqdm=False):
        raise NotImplementedError


@pytest.mark.parametrize("shots", [0, 2])
def test_the_three_agree_on_every_task(model, tokenizer, folder, tmp_path, shots):
    ours, records = score_likelihood_tasks(model, tokenizer, TASKS, folder, shots=shots)
    (tmp_path / "tasks").mkdir()
    describe(TASKS, folder, tmp_path / "tasks")
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    plain = simple_evaluate(
        model=Plain(model, tokenizer), tasks=TASKS, num_fewshot=shots, bootstrap_iters=0, task_manager=manager
    )
    theirs, answers = run_tasks(model, tokenizer, TASKS, folder, shots=shots)
    for name in TASKS:
        own = [record for record in records if record["task"] == name]
        whole = sorted(plain["samples"][name], key=lambda sample: sample["doc_id"])
        in_ours = sorted((a for a in answers if a["task"] == name), key=lambda a: a["line"])
        assert len(own) == len(whole) == len(in_ours) == 5
        for record, sample, answer in zip(own, whole, in_ours, strict=True):
            expected = [logprob for logprob, _ in sample["filtered_resps"]]
            assert record["logprobs"] == pytest.approx(expected, abs=1e-4)
            assert [logprob for logprob, _ in answer["answers"]] == pytest.approx(expected, abs=1e-4)
    values = {(row["task"], row["metric"]): row["value"] for row in ours}
    assert {(row["task"], row["metric"]) for row in theirs} <= set(values)
    for row in theirs:
        key = row["task"], row["metric"]
        assert row["n"] == 5 and row["value"] == pytest.approx(values[key], rel=1e-4)
        assert plain["results"][key[0]][f"{key[1]},none"] == pytest.approx(values[key], rel=1e-4)


@pytest.mark.parametrize("length", [2, 5, 16])
@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 15, 16, 17, 40])
def test_windows_are_those_of_lm_eval(length, count):
    ids = list(range(count))
    theirs = [make_disjoint_window(pair) for pair in get_rolling_token_windows(ids, 99, length, 1)]
    assert windows(ids, 99, length) == [tuple(pair) for pair in theirs]


def test_the_class_answers_each_kind_of_request(model, tokenizer):
    lm = native(model, tokenizer, text_window=8)
    text = "a text of some words"
    (summed,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    assert summed == rolling(model, tokenizer, text, 8) != rolling(model, tokenizer, text)
    asked = [Instance("generate_until", {}, ("a", {"until": ["\n"], "max_gen_toks": 5}), 0)]
    assert len(lm.generate_until(asked)) == 1
    (answer,) = lm.loglikelihood([Instance("loglikelihood", {}, ("a", " b"), 0)])
    assert answer == pytest.approx(Plain(model, tokenizer).loglikelihood([Instance("", {}, ("a", " b"), 0)])[0])


def test_tasks_that_there_are_not(model, tokenizer, folder, refuses):
    with refuses("lm-eval has no task 'mmlu' for local files, expected some of hellaswag"):
        run_tasks(model, tokenizer, ["mmlu"], folder)
    (folder / "piqa.jsonl").unlink()
    with refuses("task piqa needs", FileNotFoundError):
        run_tasks(model, tokenizer, ["piqa"], folder)
    (folder / "storycloze.jsonl").rename(folder / "storycloze.csv")
    with refuses("lm-eval reads storycloze from storycloze.jsonl"):
        run_tasks(model, tokenizer, ["storycloze"], folder)


def test_the_command_gives_the_same_table_by_either_way(model, tokenizer, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    save_model("run", model, tokenizer)
    tables = []
    for way in ([], ["--lm-eval"]):
        main(["eval", "run", "--tasks", "winogrande,copa", "--data", ".", "--json", "r.json", *way])
        tables.append([line.split("|")[:6] for line in capsys.readouterr().out.splitlines() if line.startswith("|")])
    assert tables[0] == tables[1] and len(tables[0]) == 4
    assert json.loads((folder / "r.json").read_text(encoding="utf-8"))["scorer"].startswith("lm-eval 0.")
