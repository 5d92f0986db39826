"""Text from a folder of `retentive export RUN --to hf`, by transformers alone.

retentive export novels --to hf --out novels-hf
python examples/hf_generate.py novels-hf "The old house"
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompts = sys.argv[1], sys.argv[2:] or ["The old house", "It was"]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
batch = tokenizer(prompts, return_tensors="pt", padding=True)
out = model.generate(**batch, max_new_tokens=40, do_sample=False)
for text in tokenizer.batch_decode(out, skip_special_tokens=True):
    print(text, "\n")
