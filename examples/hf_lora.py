"""LoRA with PEFT on a folder of `retentive export RUN --to hf`: the adapter learns a text, and is merged.

retentive export novels --to hf --out novels-hf
python examples/hf_lora.py novels-hf README.md novels-lora
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, text, out = sys.argv[1:4]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
base = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
targets = ["q_proj", "k_proj", "v_proj", "g_proj", "out_proj", "gate_proj", "up_proj", "down_proj"]
model = get_peft_model(base, LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM"))
model.print_trainable_parameters()

ids = tokenizer(Path(text).read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
rows = ids[: len(ids) // 128 * 128].view(-1, 128)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
for step in range(30):
    batch = rows[torch.randint(len(rows), (4,))]
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 9:
        print(f"step {step + 1}: loss {loss.item():.3f}")
merged = model.merge_and_unload()
merged.save_pretrained(out)
tokenizer.save_pretrained(out)
