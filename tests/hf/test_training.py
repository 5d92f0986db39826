"""Trainer, PEFT and TRL train transformers' classes as this package trains its own."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

pytest.importorskip("accelerate", reason="Trainer needs pip install accelerate")

from retentive.data.templates import TURNS
from retentive.data.tokenizer import ByteTokenizer
from retentive.hf.folder import TARGETS
from retentive.models import build, retnet
from tests.export.variants import peaked

TEXT = "The days of the old house by the river are long. "
QUIET = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "logging_steps": 1}


def rows(count: int, length: int = 64) -> list[dict[str, list[int]]]:
    ids = list((TEXT * 20).encode())
    return [{"input_ids": ids[n : n + length], "labels": ids[n : n + length]} for n in range(count)]


@pytest.fixture
def small(exported):
    """The folder of a small model with a chat template."""
    return exported(build(retnet(vocab_size=257, dim=32, layers=2, heads=2)), TURNS, ByteTokenizer())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_trainer_trains_evaluates_and_keeps_what_it_learnt(small, tmp_path, same):
    model = AutoModelForCausalLM.from_pretrained(small)
    how = TrainingArguments(
        str(tmp_path / "out"), max_steps=12, per_device_train_batch_size=4, learning_rate=1e-2, eval_strategy="steps",
        eval_steps=6, gradient_checkpointing=True, **QUIET,
    )  # fmt: skip
    trainer = Trainer(model, how, train_dataset=rows(32), eval_dataset=rows(4))
    trainer.train()
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert losses[-1] < losses[0] and trainer.predict(rows(2)).predictions.shape == (2, 64, 257)
    trainer.save_model(str(tmp_path / "kept"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "kept")
    same(list(again.parameters()), [p.detach() for p in model.parameters()], 0)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_lora_reaches_every_projection(small, tmp_path, same):
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(small)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=list(TARGETS), task_type="CAUSAL_LM"))
    reached = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    assert len(reached) == 2 * len(TARGETS)
    batch = {key: torch.tensor([row[key] for row in rows(4)]) for key in ("input_ids", "labels")}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        losses.append(model(**batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    want = model.eval()(batch["input_ids"]).logits
    same(model.merge_and_unload()(batch["input_ids"]).logits, want, 1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_trl_packs_without_leaks(small, tmp_path):
    """SFT of packed rows has the loss of the same texts apart, since packed texts do not see each other."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    words = AutoTokenizer.from_pretrained(small, trust_remote_code=True)
    texts = datasets.Dataset.from_list([{"text": TEXT * n} for n in (1, 2, 3, 1, 2, 3, 1, 2)])
    first = {}
    for packing in (False, True):
        model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
        how = trl.SFTConfig(
            str(tmp_path / str(packing)), max_steps=1, per_device_train_batch_size=8, packing=packing, max_length=1024,
            bf16=False, dataset_num_proc=None, **QUIET,
        )  # fmt: skip
        trainer = trl.SFTTrainer(model, args=how, train_dataset=texts, processing_class=words)
        trainer.train()
        first[packing] = next(line["loss"] for line in trainer.state.log_history if "loss" in line)
    assert abs(first[True] - first[False]) < 1e-3 * first[False]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_trl_dpo(small, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    words = AutoTokenizer.from_pretrained(small, trust_remote_code=True)
    pairs = [{"prompt": "Who?", "chosen": "The old house. ", "rejected": "zzzz zzzz "}] * 8
    model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    how = trl.DPOConfig(
        str(tmp_path / "out"), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, bf16=False, **QUIET
    )
    trainer = trl.DPOTrainer(model, args=how, train_dataset=datasets.Dataset.from_list(pairs), processing_class=words)
    trainer.train()
    margins = [line["rewards/margins"] for line in trainer.state.log_history if "rewards/margins" in line]
    assert margins[-1] > margins[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@torch.no_grad()
def test_compiled_it_computes_the_same(as_theirs, same):
    theirs, ids = as_theirs(peaked()), torch.arange(60)[None]
    want = theirs(ids, use_cache=False).logits
    same(torch.compile(theirs)(ids, use_cache=False).logits, want, 1e-4)
