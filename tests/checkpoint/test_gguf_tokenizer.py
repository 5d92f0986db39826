"""Tokenizers and chat templates in GGUF files: the tokens of tokenizers, llama.cpp and sentencepiece."""

import json

import numpy as np
import pytest

from retentive.checkpoint import ModelFolder
from retentive.checkpoint.gguf import Gguf
from tests.checkpoint.gguf_files import CHATML, TEXT, VOCAB

gguf = pytest.importorskip("gguf", reason="needs the extra `gguf`")


def splits(pre: str):
    """The same split written with the parts that the original tokenizers use."""
    from tokenizers import Regex, pre_tokenizers

    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "gpt-2":
        return to_bytes
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), to_bytes])
    digits = r"\p{N}{1,3}" if pre == "llama-bpe" else r"\p{N}"
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), to_bytes])


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_tokens_are_those_of_the_original(pre, worded):
    from tokenizers import Tokenizer, decoders

    found = ModelFolder.open(worded(pre)).tokenizer
    model = json.loads(found.vocabulary())["model"]
    original = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    original.pre_tokenizer, original.decoder = splits(pre), decoders.ByteLevel()
    ids = found.encode(TEXT)
    assert ids == original.encode(TEXT).ids and len(ids) < 0.9 * len(TEXT.encode())  # merges happen
    assert found.decode(ids) == TEXT and found.encode("<|im_end|>") != [2], "text stays text"
    assert found.encode("a<user>b")[1] == 3 and found.decode([2, *ids]) == TEXT
    assert (found.eos, found.eos_id, found.bos) == ("<|im_end|>", 2, "<|im_start|>")


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", None])
def test_tokens_are_those_of_llama_cpp(pre, worded):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is the oracle")
    file = worded(pre)
    theirs = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    ours = ModelFolder.open(file).tokenizer
    for text in (TEXT, "", " ", "a", "\n\n \n", "12345 1 22 333", "don't DON'T", "x" * 40, "  y", "é" * 9):
        assert ours.encode(text) == theirs.tokenize(text.encode(), add_bos=False, special=False), text


def test_a_conversation_ends_where_its_template_ends_an_answer(worded):
    folder = ModelFolder.open(worded())
    template = folder.template(folder.tokenizer)
    assert template.own and template.stop_ids == {2} and template.stop == ()
    said = template.first([{"role": "user", "content": "hat <|im_end|>"}])
    assert said[0] == 1 and said.count(2) == 1 and said.count(1) == 2  # the name in the message stays text
    assert folder.template_source == CHATML


def test_a_padded_embedding_writes_no_padding(worded):
    tokenizer = ModelFolder.open(worded()).tokenizer_for_text()
    assert VOCAB - 40 < tokenizer.vocab_size <= VOCAB and tokenizer.decode([VOCAB - 1]) == ""


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A SentencePiece BPE with bytes for unknown characters."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text.txt").write_text("\n".join([TEXT, "the cat sat on the mat and the hat ==== ----"] * 30))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "m"), vocab_size=VOCAB + 30, model_type="bpe",
        byte_fallback=True, character_coverage=0.98, normalization_rule_name="identity", minloglevel=2,
        remove_extra_whitespaces=False, split_digits=True, user_defined_symbols=["<user>"],
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "m.model"))


def with_pieces(theirs, **fields):
    def add(writer) -> None:
        count = theirs.get_piece_size()
        kinds = (theirs.is_unknown, theirs.is_control, theirs.is_byte)
        writer.add_tokenizer_model("llama")
        writer.add_token_list([theirs.id_to_piece(n) for n in range(count)])
        writer.add_token_scores([theirs.get_score(n) for n in range(count)])
        found = [next((k for k, of in zip((2, 3, 6), kinds, strict=True) if of(n)), 1) for n in range(count)]
        found[theirs.piece_to_id("<user>")] = 4
        writer.add_token_types(found)
        writer.add_bos_token_id(theirs.bos_id())
        writer.add_eos_token_id(theirs.eos_id())
        for key, value in fields.items():
            writer.add_bool(f"tokenizer.ggml.{key}", value)

    return add


def test_pieces_are_those_of_sentencepiece(pieces, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    with_pieces(pieces)(writer)
    writer.add_tensor("token_embd.weight", np.zeros((pieces.get_piece_size(), 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = Gguf.open(tmp_path / "m.gguf").tokenizer
    rng = np.random.default_rng(0)
    words = ["the", " ", "hat", "=", "==", "-", "café", "東", "\n", "12", "mat", "  ", "ß", "a"]
    texts = ["".join(rng.choice(words, 30)) for _ in range(200)] + [TEXT, "the hat", " the", "", "a"]
    for text in texts:
        assert found.encode(text) == pieces.encode(text), text
        assert found.decode(found.encode(text)) == text
    assert found.eos == "</s>" and found.bos == "<s>" and found.special["<unk>"] == 0
