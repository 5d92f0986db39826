"""Supervised fine-tuning with TRL on a folder of `retentive export RUN --to hf`, several texts packed into a row.

retentive export novels --to hf --out novels-hf
python examples/hf_sft.py novels-hf README.md novels-sft
"""

import sys
from pathlib import Path

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

folder, text, out = sys.argv[1:4]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
parts = [part for part in Path(text).read_text(encoding="utf-8").split("\n\n") if part.strip()]
config = SFTConfig(
    out, max_steps=30, per_device_train_batch_size=4, learning_rate=1e-3, packing=True, max_length=256, bf16=False,
    logging_steps=10, report_to=[], use_cpu=not torch.cuda.is_available(),
)  # fmt: skip
rows = datasets.Dataset.from_list([{"text": part} for part in parts])
trainer = SFTTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer)
trainer.train()
trainer.save_model(out)
