"""Folders of other projects' weights and logits, small ones here and larger ones beside the checkout; GGUF files."""

import json
from pathlib import Path

import pytest
import torch

from retentive.data.tokenizer import BPETokenizer, train_bpe
from tests.checkpoint.gguf_files import DIM, FFN, HEADS, KV, LAYERS, SCALINGS, TEXT, VOCAB, with_words, write_gguf

FOLDERS = {
    "small": Path(__file__).parent / "fixtures",
    "large": Path(__file__).parents[2].parent / "shared" / "data" / "parity",
}


@pytest.fixture(params=FOLDERS, scope="session")
def parity(request) -> Path:
    folder = FOLDERS[request.param]
    if request.param == "large" and not folder.is_dir():
        pytest.skip(f"no larger weights of other projects at {folder}")
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """`original(kind)`: (a random model of transformers, its folder)"""
    transformers = pytest.importorskip("transformers")
    made = {}

    def make(kind: str):
        if kind in made:
            return made[kind]
        name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind.partition("-")[0]]
        fields = dict(
            vocab_size=VOCAB, hidden_size=DIM, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            num_key_value_heads=KV, intermediate_size=FFN, rms_norm_eps=1e-5,
            tie_word_embeddings=kind == "llama-tied",
            head_dim=32 if kind in ("llama-wide", "qwen3") else DIM // HEADS,
        )  # fmt: skip
        config = getattr(transformers, f"{name}Config")(**fields)
        config.rope_parameters = {"rope_theta": 50_000.0, **SCALINGS.get(kind, {"rope_type": "default"})}
        config.attention_bias = kind == "llama-biased"
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        with torch.no_grad():
            for n, x in model.named_parameters():
                x.normal_(1.0, 0.2) if n.endswith("norm.weight") else x.normal_(0.0, 0.15)
                if n.endswith("o_proj.bias"):  # the one bias that is read only if it is zero
                    x.zero_()
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)
        made[kind] = model, folder
        return made[kind]

    return make


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return train_bpe([TEXT * 20, "the cat sat on the mat and the hat " * 50], VOCAB - 20)


@pytest.fixture
def worded(original, bpe, tmp_path):
    """`worded(pre)`: a file with a byte-level tokenizer that splits words so"""
    model = json.loads(bpe.vocabulary())["model"]

    def make(pre: str | None = "smollm", **fields) -> Path:
        words = with_words(pre, model["vocab"], model["merges"], **fields)
        return write_gguf(tmp_path / f"{pre}.gguf", original("llama-tied")[0], words=words)

    return make


@pytest.fixture
def ids():
    return torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
