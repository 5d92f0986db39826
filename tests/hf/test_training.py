"""Trainer, PEFT and TRL train transformers' classes as this package trains its own."""

import argparse
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

pytest.importorskip("accelerate", reason="Trainer needs pip install accelerate")

from retentive.data.loader import Batch
from retentive.data.templates import TURNS
from retentive.data.tokenizer import ByteTokenizer
from retentive.hf.folder import TARGETS
from retentive.models import build, retnet
from retentive.train import Hooks, TrainConfig, language_modelling, train
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_trls_sft_reaches_the_loss_of_our_loop(exported, tmp_path):
    """On the same rows in the same order, with the same options: within 1 %. Sums are made in another order."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    ids = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    rows = ids[: len(ids) // 129 * 129].view(-1, 129)[:640]
    held, rows = rows[:32], rows[32:]
    model = build(retnet(vocab_size=257, dim=64, layers=2, heads=2))
    theirs = AutoModelForCausalLM.from_pretrained(exported(model), dtype=torch.float32)

    class Rows:
        length = 128

        def __getitem__(self, step):
            part = rows[step * 8 % len(rows) : step * 8 % len(rows) + 8]
            return Batch(part[:, :-1].contiguous(), part[:, 1:].contiguous(), None, None)

    class InOrder(trl.SFTTrainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    def loss(logits):
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), held[:, 1:].flatten()))

    config = TrainConfig(
        steps=200, lr=2e-3, warmup=1, schedule="constant", weight_decay=0.0, beta2=0.95, precision="fp32",
        eval_every=0, sample_every=0, save_every=1000, device="cpu",
    )  # fmt: skip
    before = loss(model(held[:, :-1])[0])
    train(model, Rows(), language_modelling, config, tmp_path / "ours", Hooks(quiet=True))
    how = trl.SFTConfig(
        str(tmp_path / "trl"), max_steps=200, per_device_train_batch_size=8, learning_rate=2e-3, weight_decay=0.0,
        lr_scheduler_type="constant", adam_beta2=0.95, max_grad_norm=1.0, max_length=None, bf16=False,
        optim="adamw_torch", dataset_kwargs={"skip_prepare_dataset": True}, **QUIET,
    )  # fmt: skip
    data = datasets.Dataset.from_list([{"input_ids": row.tolist()} for row in rows])
    words = AutoTokenizer.from_pretrained(tmp_path / "theirs", trust_remote_code=True)
    InOrder(theirs.train(), args=how, train_dataset=data, processing_class=words).train()
    with torch.no_grad():
        ours, other = loss(model.eval()(held[:, :-1])[0]), loss(theirs.eval()(held[:, :-1]).logits)
    assert ours < 0.6 * before and abs(other - ours) < 0.01 * ours


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_blocks_may_lie_on_other_devices(exported, tmp_path, same):
    """Here one of them on the disk, from which it is read at each call."""
    model, ids = peaked(), torch.arange(40)[None]
    folder = exported(model)
    places = dict.fromkeys(("model.embed", "model.embed_norm", "model.norm", "lm_head", "model.blocks.0"), "cpu")
    places |= {"model.blocks.1": "disk"}
    for where in ("auto", places):
        theirs = AutoModelForCausalLM.from_pretrained(folder, device_map=where, offload_folder=str(tmp_path / "disk"))
        same(theirs(ids).logits, model(ids)[0], 1e-5)
        out = theirs.generate(ids[:, :9], max_new_tokens=9, do_sample=False)
        want = AutoModelForCausalLM.from_pretrained(folder).generate(ids[:, :9], max_new_tokens=9, do_sample=False)
        assert torch.equal(out, want)
