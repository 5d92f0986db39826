"""GGUF files that are cut, damaged or of models that are not supported: one clear line each."""

import struct
from pathlib import Path

import numpy as np
import pytest

import retentive
from retentive.checkpoint import ModelFolder
from tests.checkpoint.gguf_files import DIM, FFN, LLAMA_3, VOCAB, with_words, write_gguf

gguf = pytest.importorskip("gguf", reason="needs the extra `gguf`")


@pytest.fixture
def whole(original, tmp_path) -> Path:
    return write_gguf(tmp_path / "m.gguf", original("llama")[0])


def test_cut_files_are_refused_wherever_they_are_cut(worded):
    file = worded()
    raw = file.read_bytes()
    for size in (0, 3, 5, 8, 20, 30, 100, 1000, 5000, len(raw) // 2, len(raw) - 1):
        file.write_bytes(raw[:size])
        with pytest.raises(ValueError, match=r"cut short|not a GGUF file") as error:
            retentive.load(file)
        assert "\n" not in str(error.value) and str(file) in str(error.value)


def test_random_damage_to_the_header_ends_in_one_line(worded):
    """Lengths of 2^63, unknown types, broken text: an error of one line, or a file that still reads."""
    file = worded()
    raw, rng = file.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(raw)
        for place in rng.integers(4, 3000, 3):
            damaged[place] = rng.integers(256)
        file.write_bytes(damaged)
        try:
            folder = ModelFolder.open(file)
            folder.tokenizer  # noqa: B018 (read now)
            folder.model()
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error), error
    assert refused > 30


HEADS_OF_FILES = {
    "not-a-gguf": (b"PK\x03\x04", 0, "is not a GGUF file: it begins with b'PK"),
    "big-endian": (struct.pack(">I", 3), 4, "is a big-endian GGUF file: convert it to little-endian"),
    "version": (struct.pack("<I", 1), 4, "is GGUF version 1; versions 2 and 3 are read"),
    "new-version": (struct.pack("<I", 9), 4, "is GGUF version 9; versions 2 and 3 are read"),
}


@pytest.mark.parametrize("case", HEADS_OF_FILES)
def test_other_files_are_refused(case, whole, refuses):
    new, place, words = HEADS_OF_FILES[case]
    raw = bytearray(whole.read_bytes())
    raw[place : place + len(new)] = new
    whole.write_bytes(raw)
    with refuses(words):
        retentive.load(whole)


NO_LENGTHS = dict(attention__key_length=None, attention__value_length=None)
REFUSED = {
    "scaling": (dict(rope__scaling__type="yarn", rope__scaling__factor=4.0), "rope scaling 'yarn'"),
    "other-divisors": (dict(tensors={"rope_freqs.weight": LLAMA_3 + 1}), "divided by rope_freqs.weight otherwise than"),
    "one-bias": (dict(tensors={"blk.0.attn_q.bias": np.ones(DIM, np.float32)}), "5 tensors missing"),
    "biases": (dict(tensors={"blk.0.ffn_up.bias": np.ones(FFN, np.float32)}), "mlp_bias=True (supported: False)"),
    "all-reasons": (
        dict(expert_count=8, attention__sliding_window=16),
        "needs what is not supported here: expert_count 8, attention.sliding_window 16",
    ),
    "partial-rotary": (dict(rope__dimension_count=8), "rope.dimension_count 8 beside a head dim of 16"),
    "values": (dict(attention__value_length=8), "attention.value_length 8 beside a head dim of 16"),
    "missing-field": (dict(feed_forward_length=None), "has no llama.feed_forward_length: expected a whole model"),
    "text-for-a-number": (dict(block_count="two"), "llama.block_count is two, expected one int"),
    "missing-tensor": (dict(tensors={"blk.1.ffn_up.weight": None}), "1 tensors missing"),
    "no-embedding": (dict(tensors={"token_embd.weight": None}), "has no token_embd.weight"),
    "unknown-tensor": (
        dict(tensors={"blk.0.attn_new.weight": np.ones((2, 32), np.float32)}),
        "'blk.0.attn_new.weight'",
    ),
    "shape": (dict(feed_forward_length=128), "ffn.gate_proj.weight is [96, 64], expected [128, 64]"),
    "heads": (dict(attention__head_count=3, rope__dimension_count=None, **NO_LENGTHS), "must divide by heads 3"),
    "shape-of-q": (dict(attention__key_length=32, attention__value_length=32, rope__dimension_count=32), "is [64, 64]"),
    "vocabulary": (dict(vocab_size=301), "names 301 tokens, its embedding has 300"),
    "blocks": (dict(block_count=3), "9 tensors missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_do_not_fit_are_refused(case, original, tmp_path, refuses):
    changes, words = REFUSED[case]
    file = write_gguf(tmp_path / "m.gguf", original("llama")[0], **changes)
    with refuses(words):
        retentive.load(file)


def test_other_architectures_types_and_parts_are_refused(original, tmp_path, refuses):
    model, _ = original("llama")
    with refuses(
        "describes 'gemma'; expected Llama's layout, or a RetNet of ours: llama, qwen2, qwen3, arwkv7, rwkv6qwen2"
    ):
        retentive.load(write_gguf(tmp_path / "a.gguf", model, arch="gemma"))
    with refuses("TQ2_0 (1 tensors); types that are read: F32, F16"):
        writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama")
        kind = gguf.GGMLQuantizationType.TQ2_0
        writer.add_tensor("token_embd.weight", np.zeros((2, 66), np.uint8), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        retentive.load(tmp_path / "b.gguf")
    with refuses("is one of 3 parts: merge them"):
        words = lambda writer: writer.add_uint16("split.count", 3)  # noqa: E731
        retentive.load(write_gguf(tmp_path / "c.gguf", model, words=words))
    (tmp_path / "d.txt").write_text("")
    with refuses("d.txt is a file; expected a model folder"):
        retentive.load(tmp_path / "d.txt")


def test_tokenizers_that_are_not_read_are_refused(worded, original, tmp_path, refuses):
    with refuses(
        "its tokenizer splits words by 'tekken' (supported: gpt-2, trillion, smollm, llama-bpe, qwen2, default)"
    ):
        retentive.load(worded("tekken"))
    with refuses("eos_token_id 999 is none of its 300 tokens"):
        words = with_words("smollm", {"a": 0, "b": 1, "ab": 2}, ["ab"])

        def wrong(writer):
            words(writer)
            writer.kv_data[0]["tokenizer.ggml.eos_token_id"].value = 999

        retentive.load(write_gguf(tmp_path / "a.gguf", original("llama")[0], words=wrong))
    with refuses("its tokenizer is of kind 'bert' (supported: gpt2, llama)"):
        words = lambda writer: writer.add_tokenizer_model("bert")  # noqa: E731
        retentive.load(write_gguf(tmp_path / "b.gguf", original("llama")[0], words=words))
    with refuses("its tokenizer has no tokenizer.ggml.tokens"):
        words = lambda writer: writer.add_tokenizer_model("gpt2")  # noqa: E731
        retentive.load(write_gguf(tmp_path / "c.gguf", original("llama")[0], words=words))

    def too_many(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(["</s>", *(f"t{n}" for n in range(VOCAB))])
        writer.add_token_merges(["t0 t1"])

    with refuses("has 301 tokens, its embedding 300 rows"):
        retentive.load(write_gguf(tmp_path / "d.gguf", original("llama")[0], words=too_many))
    model = ModelFolder.open(tmp_path / "b.gguf").model()  # the weights are there without it
    assert model.config.vocab_size == VOCAB


def test_without_the_package_the_extra_is_named(whole, monkeypatch, refuses):
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    with refuses("GGUF files are read by gguf: pip install 'retentive[gguf]'", ImportError):
        retentive.load(whole)
