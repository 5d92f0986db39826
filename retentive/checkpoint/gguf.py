"""GGUF files (llama.cpp's format) of models with Llama's layout, read as the folder that transformers would have saved,
and of RetNets that `export --to gguf` wrote, read as a folder of our own.

    file = Gguf.open("model.gguf")
    file.config()            fields of config.json
    file.tensors(dtype)      floats by the names in model.safetensors
    file.tokenizer, file.tokenizer_config()

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The package gguf (extra `gguf`) knows the types of
tensors and decodes them. The header is read here: the package's reader makes an array of every token and takes two
seconds for 49,152 of them, and a damaged length can keep it busy forever.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from retentive.checkpoint import rwkv
from retentive.checkpoint.gguf_tokenizer import read_tokenizer, token_of
from retentive.checkpoint.keys import rename
from retentive.data.tokenizer import BPETokenizer

SUFFIX = ".gguf"
VERSIONS = (2, 3)
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
"""Types of tensors that are read."""
BLOCK = 32
"""Columns of a block of Q8_0 and Q4_0, which has one scale."""
PERMUTED = {"llama": True, "qwen2": False, "qwen3": False}
"""Architectures that are read; True if rows of q and k are stored for interleaved rotation."""
TABLE = [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
    ("blk.{i}.attn_norm.weight", "model.layers.{i}.input_layernorm.weight"),
    ("blk.{i}.ffn_norm.weight", "model.layers.{i}.post_attention_layernorm.weight"),
    ("blk.{i}.attn_q.weight", "model.layers.{i}.self_attn.q_proj.weight"),
    ("blk.{i}.attn_k.weight", "model.layers.{i}.self_attn.k_proj.weight"),
    ("blk.{i}.attn_v.weight", "model.layers.{i}.self_attn.v_proj.weight"),
    ("blk.{i}.attn_q.bias", "model.layers.{i}.self_attn.q_proj.bias"),
    ("blk.{i}.attn_k.bias", "model.layers.{i}.self_attn.k_proj.bias"),
    ("blk.{i}.attn_v.bias", "model.layers.{i}.self_attn.v_proj.bias"),
    ("blk.{i}.attn_output.weight", "model.layers.{i}.self_attn.o_proj.weight"),
    ("blk.{i}.attn_output.bias", "model.layers.{i}.self_attn.o_proj.bias"),
    ("blk.{i}.attn_q_norm.weight", "model.layers.{i}.self_attn.q_norm.weight"),
    ("blk.{i}.attn_k_norm.weight", "model.layers.{i}.self_attn.k_norm.weight"),
    ("blk.{i}.ffn_gate.weight", "model.layers.{i}.mlp.gate_proj.weight"),
    ("blk.{i}.ffn_up.weight", "model.layers.{i}.mlp.up_proj.weight"),
    ("blk.{i}.ffn_down.weight", "model.layers.{i}.mlp.down_proj.weight"),
]
FACTORS = "rope_freqs.weight"
"""Name of the tensor that holds Llama 3's rope scaling: the divisor of each angle."""
LLAMA_3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""Fields of Llama 3's rope scaling, the same in all its models; GGUF files hold only the divisors."""
LLAMA_3_CONTEXT = 8192
"""Context length of Llama 3 before it was extended."""
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Numbers in metadata by the format's code of their type, as `struct` calls them."""
TEXT, ARRAY = 8, 9
DIMENSIONS = 4
"""Maximum number of a tensor's dimensions."""


class Entry(NamedTuple):
    """One tensor in the file."""

    type: str
    shape: tuple[int, ...]
    """Shape in torch's order, rows first."""
    start: int
    """Byte of the file that it begins at."""
    row: int
    """Bytes of a row."""

    @property
    def rows(self) -> int:
        return int(np.prod(self.shape[:-1], dtype=object)) if len(self.shape) > 1 else 1


@dataclass(frozen=True)
class Gguf:
    """A GGUF file whose header has been read; tensors are read on demand."""

    path: Path
    fields: Mapping[str, Any]
    """Metadata by key."""
    entries: Mapping[str, Entry]
    """Tensors by their names in the file."""

    @staticmethod
    def open(path: Path) -> "Gguf":
        """Reads the header of a file.

        Raises:
            ImportError: the package gguf is missing (extra `gguf`).
            ValueError: it is no GGUF file, it is cut short, big-endian, one part of several or of an unknown version,
                or has tensors of types that are not read.
        """
        library, size = _library(), path.stat().st_size
        with open(path, "rb") as file:
            head = _Header(path, file, size)
            tensors, count = head.begin()
            fields = {}
            for _ in range(count):
                key = head.text()
                fields[key] = head.value(head.number("I"))
            if fields.get("split.count", 1) > 1:
                raise ValueError(f"{path} is one of {fields['split.count']} parts: merge them by llama-gguf-split")
            found = {head.text(): head.tensor() for _ in range(tensors)}
            align = fields.get("general.alignment", 32)
            if not isinstance(align, int) or align < 1:
                raise head.damaged(f"its alignment is {align!r}")
            start = -(-head.at // align) * align
        entries = {name: _entry(library, path, name, *info, start) for name, info in found.items()}
        _check_types(path, entries)
        for name, entry in entries.items():
            if (end := entry.start + entry.rows * entry.row) > size:
                raise ValueError(f"{path} is cut short: {name} ends at byte {end:,} of {size:,}; copy it again")
        return Gguf(path, fields, entries)

    @property
    def architecture(self) -> str:
        """Name of its architecture, which begins the keys of its dimensions."""
        return str(self.fields.get("general.architecture", "nothing known"))

    @property
    def types(self) -> list[str]:
        """Types of its matrices, the commonest first."""
        found = [entry.type for entry in self.entries.values() if len(entry.shape) > 1]
        return sorted(set(found), key=lambda kind: (-found.count(kind), kind))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the loaded weights if none is named: float32 if all matrices are F32, otherwise bfloat16."""
        return torch.float32 if self.types == ["F32"] else torch.bfloat16

    def config(self) -> dict[str, Any]:
        """Returns the fields that transformers' config.json would have; for a RetNet those of ours.

        Raises:
            ValueError: it needs something that is not read (the message names all of it), or lacks a field or tensor.
        """
        arch = self.architecture
        if arch in rwkv.ARCHITECTURES:
            return self._our_config()
        if arch not in PERMUTED:
            known = ", ".join((*PERMUTED, *rwkv.ARCHITECTURES))
            raise ValueError(f"{self.path} describes {arch!r}; expected Llama's layout, or a RetNet of ours: {known}")
        if reasons := self._unsupported():
            raise ValueError(f"{self.path} needs what is not supported here: {', '.join(reasons)}")
        dim, heads = self._number("embedding_length"), self._number("attention.head_count")
        embedding = self.entries.get("token_embd.weight")
        if embedding is None:
            raise ValueError(f"{self.path} has no token_embd.weight: expected a whole model")
        vocab_size = self._number("vocab_size", embedding.rows)
        if embedding.rows != vocab_size:
            raise ValueError(f"{self.path} names {vocab_size:,} tokens, its embedding has {embedding.rows:,}: damaged")
        return {
            "model_type": arch,
            "vocab_size": vocab_size,
            "hidden_size": dim,
            "num_hidden_layers": self._number("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._number("attention.head_count_kv", heads),
            "head_dim": self._head_dim(),
            "intermediate_size": self._number("feed_forward_length"),
            "hidden_act": "silu",
            "rope_theta": self._number("rope.freq_base", 10000.0, float),
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon", None, float),
            "tie_word_embeddings": "output.weight" not in self.entries,
            "rope_scaling": self._rope_scaling(),
            # always there in Qwen2, whose config does not name them
            "attention_bias": arch != "qwen2" and self._biased("attn"),
            "mlp_bias": self._biased("ffn"),
        }

    def _our_config(self) -> dict[str, Any]:
        """Returns the config.json in the metadata of a RetNet; raises ValueError if there is none."""
        text = self.fields.get(rwkv.CONFIG)
        if not isinstance(text, str):
            raise ValueError(
                f"{self.path} is a model of {self.architecture} without {rwkv.CONFIG}: RWKV models are not read"
            )
        return {"model_type": self.architecture, rwkv.CONFIG: text}

    def _biased(self, part: str) -> bool:
        """True if layers of this part of a block have biases."""
        return any(f".{part}_" in name and name.endswith(".bias") for name in self.entries)

    def _rope_scaling(self) -> dict[str, Any]:
        """Returns the fields of config.json's rope_scaling; raises ValueError for divisors that are not Llama 3's."""
        if FACTORS not in self.entries:
            kind = self.fields.get(f"{self.architecture}.rope.scaling.type", "none")
            factor = self._number("rope.scaling.factor", 1.0, float)
            return {"rope_type": "default"} if kind == "none" else {"rope_type": kind, "factor": factor}
        with open(self.path, "rb") as file:
            found = self._decoded(_library(), file, FACTORS, self.entries[FACTORS]).double()
        scaling = {**LLAMA_3, "factor": float(found.max()), "original_max_position_embeddings": LLAMA_3_CONTEXT}
        wanted = _divisors(scaling, self._number("rope.freq_base", 10000.0, float), len(found))
        if not torch.allclose(found, wanted, rtol=1e-4):  # stored in float32
            raise ValueError(f"{self.path} has angles divided by {FACTORS} otherwise than Llama 3's: not supported")
        return scaling

    def _unsupported(self) -> list[str]:
        """Returns names of all that the model needs and that the fields of config.json above do not hold."""
        arch, found = self.architecture, []
        for key in ("expert_count", "attention.sliding_window", "attention.scale", "logit_scale"):
            if value := self.fields.get(f"{arch}.{key}"):
                found.append(f"{key} {value}")
        K = self._head_dim()
        for key in ("attention.value_length", "rope.dimension_count"):
            if (value := self.fields.get(f"{arch}.{key}", K)) != K:
                found.append(f"{key} {value} beside a head dim of {K}")
        return found

    def _head_dim(self) -> int:
        heads = self._number("attention.head_count")
        return self._number("attention.key_length", self._number("embedding_length") // max(heads, 1))

    def _number(self, key: str, default: Any = None, kind: type = int) -> Any:
        """Returns a number of the architecture; raises ValueError if it is missing or no number of this kind."""
        key = f"{self.architecture}.{key}"
        value: Any = self.fields.get(key, default)
        if value is None:
            raise ValueError(f"{self.path} has no {key}: expected a whole model")
        is_number = isinstance(value, kind) and not isinstance(value, bool)
        if not is_number:
            raise ValueError(f"{self.path}: {key} is {str(value)[:60]}, expected one {kind.__name__}")
        return float(str(np.float32(value))) if kind is float else value  # 1e-5 is stored as 9.999999747378752e-06

    def tensors(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Returns all tensors by transformers' names, decoded to floats, the rows of q and k in transformers' order;
        those of a RetNet by the names of llama.cpp.

        Args:
            dtype: their dtype; by default `self.dtype`.

        Raises:
            ValueError: the file has been cut since it was opened, or has a tensor that Llama's layout does not know.
        """
        library, heads = _library(), {}
        if PERMUTED.get(self.architecture):
            q = self._number("attention.head_count")
            heads = {"attn_q": q, "attn_k": self._number("attention.head_count_kv", q)}
        found = {}
        with open(self.path, "rb") as file:
            for name, entry in self.entries.items():
                if name == FACTORS:  # in the config
                    continue
                w = self._decoded(library, file, name, entry).to(dtype or self.dtype)
                count = next((heads[part] for part in name.split(".") if part in heads), 0)
                if count and not len(w) % (2 * count):  # (i, i + K/2) are neighbours in the file
                    w = w.unflatten(0, (count, -1, 2)).transpose(1, 2).reshape(w.shape)
                found[name] = w
        if self.architecture in rwkv.ARCHITECTURES:
            return found
        try:
            return rename(found, TABLE)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None

    def _decoded(self, library: ModuleType, file: BinaryIO, name: str, entry: Entry) -> Tensor:
        """Reads one tensor as float32. Reads, since a mapped file that somebody cuts ends the process (SIGBUS)."""
        file.seek(entry.start)
        raw = np.fromfile(file, np.uint8, entry.rows * entry.row)
        if raw.size < entry.rows * entry.row:
            raise ValueError(f"{self.path} was cut short while {name} was read: copy it again")
        kind = library.GGMLQuantizationType[entry.type]
        return torch.from_numpy(library.quants.dequantize(raw.reshape(entry.rows, entry.row), kind)).view(entry.shape)

    # text

    @cached_property
    def tokenizer(self) -> BPETokenizer | None:
        """Tokenizer in the metadata; None without one. Raises ValueError for a kind that is not read."""
        rows, tokens = self.entries["token_embd.weight"].rows, self.fields.get("tokenizer.ggml.tokens", ())
        if len(tokens) > rows:
            raise ValueError(f"{self.path} has {len(tokens):,} tokens, its embedding {rows:,} rows: damaged")
        try:
            return read_tokenizer(self.fields)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None

    def tokenizer_config(self) -> dict[str, Any]:
        """Returns the fields of transformers' tokenizer_config.json that a chat template needs."""
        return {
            "chat_template": self.fields.get("tokenizer.chat_template"),
            "bos_token": token_of(self.fields, "bos"),
            "eos_token": token_of(self.fields, "eos"),
        }


class _Header:
    """Reads values one after another and never beyond the end of the file."""

    def __init__(self, path: Path, file: BinaryIO, size: int):
        self.path, self.file, self.size, self.at = path, file, size, 0

    def begin(self) -> tuple[int, int]:
        """Returns the numbers of (tensors, metadata keys) after checking the magic number and the version."""
        magic = self.file.read(4)
        if magic != b"GGUF":
            raise ValueError(f"{self.path} is not a GGUF file: it begins with {magic!r}")
        self.at = 4
        version = self.number("I")
        if not version & 0xFFFF:
            raise ValueError(f"{self.path} is a big-endian GGUF file: convert it to little-endian")
        if version not in VERSIONS:
            raise ValueError(f"{self.path} is GGUF version {version}; versions 2 and 3 are read: convert it again")
        return self.number("Q"), self.number("Q")

    def bytes(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise self.damaged("its header ends early")
        self.at += count
        return self.file.read(count)

    def numbers(self, code: str, count: int) -> tuple:
        size = struct.calcsize(code)
        return struct.unpack(f"<{count}{code}", self.bytes(size * count))

    def number(self, code: str) -> Any:
        return self.numbers(code, 1)[0]

    def text(self) -> str:
        try:
            return self.bytes(self.number("Q")).decode()
        except UnicodeDecodeError:
            raise self.damaged("a text in its header is not UTF-8") from None

    def value(self, kind: int) -> Any:
        """Returns a value of the metadata."""
        if kind == TEXT:
            return self.text()
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind != ARRAY:
            raise self.damaged(f"its header has a value of unknown type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if kind in SCALARS:
            return list(self.numbers(SCALARS[kind], count))
        if kind != TEXT:
            raise self.damaged(f"its header has a list of type {kind}")
        return [self.text() for _ in range(count)]  # a count beyond the file ends at the first missing text

    def tensor(self) -> tuple[int, tuple[int, ...], int]:
        """Returns (type, shape in torch's order, offset in the data) of a tensor."""
        if not 0 < (dimensions := self.number("I")) <= DIMENSIONS:
            raise self.damaged(f"a tensor has {dimensions} dimensions")
        shape = self.numbers("Q", dimensions)[::-1]
        return self.number("I"), shape, self.number("Q")

    def damaged(self, why: str) -> ValueError:
        return ValueError(f"{self.path} is cut short or damaged: {why}; copy it again")


def _divisors(scaling: Mapping[str, Any], base: float, count: int) -> Tensor:
    """Returns the divisors of the angles by Llama 3's rope scaling, as transformers' `_compute_llama3_parameters`."""
    waves = 2 * torch.pi * base ** (torch.arange(count).double() / count)
    low, high, factor = (scaling[name] for name in ("low_freq_factor", "high_freq_factor", "factor"))
    turns = scaling["original_max_position_embeddings"] / waves
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # share of the unscaled angle
    return 1 / (kept + (1 - kept) / factor)


def _library() -> ModuleType:
    """Returns the package gguf."""
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise ImportError("GGUF files are read by gguf: pip install 'retentive[gguf]'") from None
    return gguf


def _entry(
    library: ModuleType, path: Path, name: str, kind: int, shape: tuple[int, ...], offset: int, start: int
) -> Entry:
    """Returns the entry of a tensor; raises ValueError if its rows are no whole blocks of its type."""
    try:
        known = library.GGMLQuantizationType(kind)
    except ValueError:
        return Entry(f"type {kind}", shape, start + offset, 0)
    block, size = library.GGML_QUANT_SIZES[known]
    if shape[-1] % block:
        raise ValueError(f"{path} is damaged: {name} has rows of {shape[-1]}, {known.name} has blocks of {block}")
    return Entry(known.name, shape, start + offset, shape[-1] // block * size)


def _check_types(path: Path, entries: Mapping[str, Entry]) -> None:
    """Raises ValueError if tensors have types that are not read; the message names all types."""
    odd = [entry.type for entry in entries.values() if entry.type not in TYPES]
    if odd:
        kinds = ", ".join(f"{kind} ({odd.count(kind)} tensors)" for kind in sorted(set(odd)))
        raise ValueError(f"{path} has tensors of {kinds}; types that are read: {', '.join(TYPES)}")
