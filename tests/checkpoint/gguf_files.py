"""GGUF files for tests: tiny models of transformers and tokenizers, as llama.cpp's converter writes them."""

from pathlib import Path

import numpy as np

VOCAB, LAYERS, DIM, HEADS, KV, FFN = 300, 2, 64, 4, 2, 96
TEXT = (
    "The capital of France is Paris; it's 1,234 km² away — isn't it?  I'LL say:\n\n\tnaïve café, Ελλάδα 東京 🙂!!\r\n"
    "  three   spaces   and trailing  \n x=12345678; don't 'quote' <|im_end|> [INST] "
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


# by transformers' `_compute_llama3_parameters` for a base of 50,000, 16 features per head and factor 8
LLAMA_3 = np.array([1, 1, 1, 1, 1, 3.661414, 8, 8], np.float32)
SCALINGS = {
    "llama-linear": {"rope_type": "linear", "factor": 4.0},
    "llama-3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
STORED = {
    "llama-linear": {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0},
    "llama-3": {"tensors": {"rope_freqs.weight": LLAMA_3}},
}
"""The same as a GGUF file holds it."""


NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def their_name(name: str) -> str:
    name, _, kind = name.rpartition(".")
    if name.startswith("model.layers."):
        _, _, block, rest = name.split(".", 3)
        return f"blk.{block}.{NAMES[rest]}.{kind}"
    return f"{NAMES[name]}.{kind}"


def interleaved(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp's converter stores them: (i, i + K/2) of each head side by side."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(w.shape)


def write_gguf(path: Path, model, kind: str = "F32", arch: str = "llama", words=lambda writer: None, **changes) -> Path:
    """Writes a model of transformers; `changes` replace or remove (None) metadata by key, `tensors` adds tensors."""
    import gguf  # an extra

    config, writer = model.config, gguf.GGUFWriter(path, arch)
    fields = {
        "block_count": LAYERS, "embedding_length": DIM, "feed_forward_length": FFN, "context_length": 64,
        "attention.head_count": HEADS, "attention.head_count_kv": KV, "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.key_length": config.head_dim, "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim, "rope.freq_base": 50_000.0, "vocab_size": VOCAB,
    }  # fmt: skip
    extra = changes.pop("tensors", {})
    for key, value in {**fields, **{k.replace("__", "."): v for k, v in changes.items()}}.items():
        if isinstance(value, str):
            writer.add_string(f"{arch}.{key}", value)
        elif value is not None:
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"{arch}.{key}", value)
    words(writer)
    tensors = {their_name(n): x.detach().numpy() for n, x in model.state_dict().items()}
    if config.tie_word_embeddings:
        del tensors["output.weight"]
    for name, x in {**tensors, **extra}.items():
        if x is None:
            continue
        if arch == "llama" and ("attn_q." in name or "attn_k." in name):
            x = interleaved(x, HEADS if "attn_q" in name else KV)
        stored = gguf.GGMLQuantizationType[kind if x.ndim > 1 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(x), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def with_words(pre: str | None, vocab: dict[str, int], merges, **fields):
    """Returns a function that writes a byte-level tokenizer, with three special tokens and one of the user."""

    def add(writer) -> None:
        tokens = [*sorted(vocab, key=vocab.__getitem__)]
        tokens = SPECIAL + ["<user>"] + [token for token in tokens if token not in SPECIAL]
        tokens += [f"[PAD{n}]" for n in range(len(tokens), VOCAB)]
        writer.add_tokenizer_model("gpt2")
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        kinds = [3] * 3 + [4] + [1] * (len(tokens) - 4)
        writer.add_token_types(
            [5 if token.startswith("[PAD") else kind for token, kind in zip(tokens, kinds, strict=False)]
        )
        writer.add_token_merges([" ".join(merge) for merge in merges])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_bos_token(False)
        writer.add_chat_template(CHATML)
        for key, value in fields.items():
            writer.add_uint32(f"tokenizer.ggml.{key}", value)

    return add
