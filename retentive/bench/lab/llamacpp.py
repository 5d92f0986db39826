"""llama.cpp with a Transformer of random weights, through the low-level functions of llama-cpp-python.

    model = Model(config, "Q4_0")           the twin's sizes, written as GGUF and quantised by llama.cpp itself
    session = Session(model, tokens=8192)   its cache; read(count) reads a prompt, step() decodes a token of each

Timed code tries both settings of its flash attention, since the faster one depends on the context.
"""

import ctypes
import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retentive.checkpoint.gguf_tokenizer import add_metadata
from retentive.checkpoint.gguf_tokenizer import written as written_tokenizer
from retentive.data.tokenizer import Tokenizer
from retentive.models import ModelConfig

MULTIPLE = 32
"""Size of its quantised blocks; widths are rounded to a multiple."""
UBATCH = 512
"""Tokens of a prompt that it computes at once: its own default."""


def write(config: ModelConfig, path: Path, tokenizer: Tokenizer | None = None) -> None:
    """Writes a GGUF file in F16 with random weights. llama-server needs a tokenizer."""
    import gguf

    rng, c, block = np.random.default_rng(0), config, config.all_alike("llama.cpp")
    width, heads, attention = block.ffn.width, block.mixer.heads, config.attention
    assert attention is not None
    head, kv_heads = attention.head_dim, attention.kv_heads
    out = gguf.GGUFWriter(str(path), "llama")
    out.add_context_length(1 << 20)
    out.add_embedding_length(c.dim)
    out.add_block_count(c.layers)
    out.add_feed_forward_length(width)
    out.add_head_count(heads)
    out.add_head_count_kv(kv_heads)
    out.add_rope_dimension_count(head)
    out.add_layer_norm_rms_eps(c.norm_eps)
    out.add_vocab_size(c.vocab_size)
    out.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    if tokenizer is None:
        out.add_tokenizer_model("none")
    else:
        add_metadata(out, written_tokenizer(tokenizer, c.vocab_size, None))

    def matrix(name: str, *shape: int) -> None:
        out.add_tensor(f"{name}.weight", (rng.standard_normal(shape, dtype=np.float32) * 0.03).astype(np.float16))

    def gain(name: str) -> None:
        out.add_tensor(f"{name}.weight", np.ones(c.dim, np.float32))

    matrix("token_embd", c.vocab_size, c.dim)
    if not c.tie_embeddings:
        matrix("output", c.vocab_size, c.dim)
    gain("output_norm")
    for i in range(c.layers):
        prefix = f"blk.{i}"
        gain(f"{prefix}.attn_norm")
        gain(f"{prefix}.ffn_norm")
        for name, rows in (("q", c.dim), ("k", head * kv_heads), ("v", head * kv_heads), ("output", c.dim)):
            matrix(f"{prefix}.attn_{name}", rows, c.dim)
        matrix(f"{prefix}.ffn_gate", width, c.dim)
        matrix(f"{prefix}.ffn_up", width, c.dim)
        matrix(f"{prefix}.ffn_down", c.dim, width)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


@functools.cache
def begin() -> Any:
    """Starts the library once, silenced. Keep the result alive, since C calls it."""
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return quiet


def written(config: ModelConfig, format: str, folder: Path, tokenizer: Tokenizer | None = None) -> Path:
    """Writes a GGUF file of the twin's sizes, widths rounded to a multiple, and returns its path.

    Args:
        format: F16, Q8_0 or Q4_0.

    Raises:
        RuntimeError: llama.cpp refuses.
    """
    import llama_cpp

    begin()
    file = folder / "f16.gguf"
    write(rounded(config), file, tokenizer)
    if format == "F16":
        return file
    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype, how.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{format}"), torch.get_num_threads()
    made = file.with_name("quantised.gguf")
    if llama_cpp.llama_model_quantize(str(file).encode(), str(made).encode(), ctypes.byref(how)):
        raise RuntimeError(f"llama.cpp could not quantise to {format}")
    file.unlink()
    return made


def rounded(config: ModelConfig) -> ModelConfig:
    """Returns the config with widths that are multiples of the block size."""
    return config.with_ffn(-config.blocks[0].ffn.width % MULTIPLE)


class Model:
    """Loaded model. The same config gives the same weights."""

    def __init__(self, config: ModelConfig, format: str):
        """
        Args:
            format: F16, Q8_0 or Q4_0.

        Raises:
            RuntimeError: llama.cpp refuses.
        """
        with tempfile.TemporaryDirectory() as folder:  # deletes the file
            self._load(written(config, format, Path(folder)), mapped=False)
        self.config: ModelConfig | None = rounded(config)

    @classmethod
    def of(cls, file: Path) -> "Model":
        """Returns the model in a GGUF file, mapped into memory, as llama.cpp does by default."""
        begin()
        model = cls.__new__(cls)
        model.config = None
        model._load(file, mapped=True)
        return model

    def _load(self, file: Path, *, mapped: bool) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        loading = llama_cpp.llama_model_default_params()
        loading.n_gpu_layers, loading.use_mmap = 0, mapped
        self.pointer = llama_cpp.llama_model_load_from_file(str(file).encode(), loading)
        if not self.pointer:
            raise RuntimeError("llama.cpp could not load its model")
        vocabulary = llama_cpp.llama_model_get_vocab(self.pointer)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def __del__(self):
        if getattr(self, "pointer", None):
            self.api.llama_model_free(self.pointer)


class Session:
    """Sequences of a model, with room in the cache."""

    def __init__(self, model: Model, *, tokens: int, sequences: int = 1, flash: bool = True):
        """
        Args:
            tokens: maximum tokens of a sequence.
            flash: use its fused attention.

        Raises:
            RuntimeError: no memory for the cache.
        """
        self.model, self.api, self.sequences, self.position = model, model.api, sequences, 0
        how = self.api.llama_context_default_params()
        how.n_ctx, how.n_seq_max, how.n_batch, how.n_ubatch = tokens * sequences, sequences, UBATCH, UBATCH
        how.n_threads = how.n_threads_batch = torch.get_num_threads()
        how.flash_attn_type, how.kv_unified = int(flash), True
        self.pointer = self.api.llama_init_from_model(model.pointer, how)
        if not self.pointer:
            raise RuntimeError(f"llama.cpp has no memory for {tokens * sequences:,} tokens")
        self.batch = self.api.llama_batch_init(UBATCH, 0, 1)

    def close(self) -> None:
        """Frees the cache."""
        if self.pointer:
            self.api.llama_batch_free(self.batch)
            self.api.llama_free(self.pointer)
            self.pointer = None

    __del__ = close

    def _decode(self, tokens: list[tuple[int, int]], logits: int) -> None:
        """Decodes tokens, each (sequence, position), with logits for the last `logits` of them."""
        self.batch.n_tokens = len(tokens)
        for i, (sequence, position) in enumerate(tokens):
            self.batch.token[i] = i % self.model.vocab_size
            self.batch.pos[i], self.batch.n_seq_id[i], self.batch.seq_id[i][0] = position, 1, sequence
            self.batch.logits[i] = int(i >= len(tokens) - logits)
        if code := self.api.llama_decode(self.pointer, self.batch):
            raise RuntimeError(f"llama.cpp could not decode (code {code})")

    def read(self, count: int) -> None:
        """Reads a prompt into the first sequence, and copies it to all others."""
        for at in range(0, count, UBATCH):
            parts = range(at, min(at + UBATCH, count))
            self._decode([(0, self.position + t) for t in parts], int(parts.stop == count))
        self.position += count
        memory = self.api.llama_get_memory(self.pointer)
        for sequence in range(1, self.sequences):
            self.api.llama_memory_seq_cp(memory, 0, sequence, -1, -1)

    def step(self) -> None:
        """Decodes one more token of every sequence, with its logits."""
        self._decode([(sequence, self.position) for sequence in range(self.sequences)], self.sequences)
        self.position += 1

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def forget(self) -> None:
        """Clears the cache."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.pointer), False)
        self.position = 0
