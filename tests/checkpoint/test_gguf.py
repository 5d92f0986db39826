"""GGUF files: logits and tokens of the model they were made from, and what is refused, each in one line."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import retentive
from retentive.checkpoint import ModelFolder, save_model
from retentive.checkpoint.adapter import targets_of, with_adapter
from retentive.checkpoint.gguf import TYPES, Gguf
from retentive.cli import main
from retentive.data.tokenizer import BPETokenizer, train_bpe
from retentive.layers.lora import Adapter
from retentive.native import NativeModel
from retentive.serve.service import open_service
from retentive.train.sft import SftRun

gguf = pytest.importorskip("gguf", reason="needs the extra `gguf`")

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


# files that are written


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


@pytest.fixture
def ids():
    return torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))


# weights


@torch.no_grad()
@pytest.mark.parametrize(
    "kind", ["llama", "llama-tied", "llama-wide", "llama-biased", "llama-linear", "llama-3", "qwen2", "qwen3"]
)
def test_floats_are_those_of_the_folder(kind, original, tmp_path, ids, same):
    model, folder = original(kind)
    file = write_gguf(tmp_path / "m.gguf", model, arch=kind.partition("-")[0], **STORED.get(kind, {}))
    ours, tokenizer = retentive.load(file)
    wanted, _ = retentive.load(folder)
    assert tokenizer is None and ours.config == wanted.config and ours.dtype == torch.float32
    same(dict(ours.named_parameters()).values(), dict(wanted.named_parameters()).values(), 0)
    same(ours.double()(ids)[0], model.double()(ids).logits, 1e-6)  # the library's norms and angles are float32
    model.float()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_other_types_are_decoded(kind, original, tmp_path, ids, same):
    """The oracle is the same model with each matrix rounded and decoded by the package, before it is permuted."""
    model, _ = original("llama")
    file = write_gguf(tmp_path / "m.gguf", model, kind)
    ours, _ = retentive.load(file, dtype="float32")
    stored, quants = gguf.GGMLQuantizationType[kind], gguf.quants
    rounded = {
        name: torch.from_numpy(quants.dequantize(quants.quantize(x.numpy(), stored), stored)) if x.ndim > 1 else x
        for name, x in model.state_dict().items()
    }
    theirs = type(model)(model.config).eval()
    theirs.load_state_dict(rounded)
    same(ours.double()(ids)[0], theirs.double()(ids).logits, 1e-6)
    by_default, _ = retentive.load(file)
    assert by_default.dtype == torch.bfloat16
    same(list(by_default.parameters()), [x.to(torch.bfloat16) for x in ours.parameters()], 0)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_are_decoded(kind, tmp_path, same):
    """The package writes none, so random blocks are read: finite scales, all else any bits."""
    stored = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[stored]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (VOCAB, size), dtype=np.uint8)
    for start in range(0, size - 1, 2):  # whatever is read as float16 has a small exponent
        raw[:, start + 1] &= 0xBB
    wanted = gguf.quants.dequantize(raw, stored)
    assert np.isfinite(wanted).all() and wanted.shape == (VOCAB, block)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen3")
    writer.add_tensor("token_embd.weight", raw, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = Gguf.open(tmp_path / "m.gguf").tensors(torch.float32)
    same(found["model.embed_tokens.weight"], torch.from_numpy(wanted), 0)


def test_every_type_that_is_read_is_tested():
    written = {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}
    assert set(TYPES) == written


@torch.no_grad()
def test_it_decodes_in_c(original, tmp_path, ids, same):
    file = write_gguf(tmp_path / "m.gguf", original("llama")[0], "Q8_0")
    for dtype, tol in (("float32", 1e-5), ("bfloat16", 2e-2)):  # bfloat16 rounds to 8 bits, in another order of sums
        model, _ = retentive.load(file, dtype=dtype)
        same(NativeModel(model)(ids[:1])[0].float(), model(ids[:1])[0].float(), tol)


def test_a_folder_of_one_file_is_that_file(original, tmp_path, refuses):
    model, folder = original("llama")
    write_gguf(tmp_path / "m.gguf", model)
    opened = ModelFolder.open(tmp_path)
    assert opened.gguf.path.name == "m.gguf" and opened.short_name == "m" and len(opened.sha256) == 64
    write_gguf(tmp_path / "n.gguf", model)
    with refuses("holds 2 models (m.gguf, n.gguf, …): name a file"):
        ModelFolder.open(tmp_path)
    write_gguf(folder / "beside.gguf", model)  # config.json comes first
    assert ModelFolder.open(folder).gguf is None
    (folder / "beside.gguf").unlink()


# words


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return train_bpe([TEXT * 20, "the cat sat on the mat and the hat " * 50], VOCAB - 20)


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


@pytest.fixture
def worded(original, bpe, tmp_path):
    """`worded(pre)`: a file with a byte-level tokenizer that splits words so"""
    model = json.loads(bpe.vocabulary())["model"]

    def make(pre: str | None = "smollm", **fields) -> Path:
        words = with_words(pre, model["vocab"], model["merges"], **fields)
        return write_gguf(tmp_path / f"{pre}.gguf", original("llama-tied")[0], words=words)

    return make


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


# other ways out


@torch.no_grad()
def test_it_goes_through_our_folder_to_llamas(worded, original, tmp_path, ids, same, capsys):
    transformers = pytest.importorskip("transformers")
    file, (model, _) = worded(), original("llama-tied")
    main(["convert", str(file), str(tmp_path / "ours")])
    main(["convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "llama"])
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    same(again.double()(ids).logits, model.double()(ids).logits, 1e-10)
    model.float()
    before, after = ModelFolder.open(file), ModelFolder.open(tmp_path / "theirs")
    assert after.tokenizer.sha256 == before.tokenizer.sha256 and after.tokenizer.eos == before.tokenizer.eos
    message = [{"role": "user", "content": "the hat"}]
    templates = [each.template(each.tokenizer) for each in (before, after)]
    assert templates[0].first(message) == templates[1].first(message) and templates[1].bos == "<|im_start|>"


def test_the_server_and_windows_take_it(worded, refuses):
    file = worded()
    service = open_service(ModelFolder.open(file).windowed(8, 2))
    assert service.name == "smollm" and service.template.own and service.states_folder == file.parent / "states"
    assert service.model.config.attention.slots == 10
    with refuses("is a GGUF file: make a folder of it first (`retentive convert`)"):
        SftRun(data=file.parent, init=str(file), out=file.parent / "run").folder()


def test_an_adapter_may_change_it(worded, tmp_path, refuses, same):
    file = worded()
    base = ModelFolder.open(file)
    model = base.model()
    targets = targets_of(model, "all", 2)
    save_model(tmp_path / "change", with_adapter(model, Adapter(str(file), base.sha256, 2, 4.0, targets)))
    ids = torch.arange(9)[None]
    with torch.no_grad():  # a new adapter changes nothing
        same(retentive.load(tmp_path / "change")[0](ids)[0], retentive.load(file)[0](ids)[0], 0)
    assert ModelFolder.open(tmp_path / "change").tokenizer.sha256 == base.tokenizer.sha256
    with open(file, "r+b") as opened:
        opened.seek(-4, 2)
        opened.write(bytes(4))
    with refuses("pass that model"):
        retentive.load(tmp_path / "change")


def test_verbs_take_it(worded, tmp_path, capsys):
    file = worded()
    main(["info", str(file)])
    assert "(GGUF of F32)" in capsys.readouterr().out
    main(["generate", str(file), "--prompt", "the", "--max-tokens", "5", "--temperature", "0"])
    shown = capsys.readouterr().out
    assert shown.startswith("the")
    main(["quantize", str(file), "--to", "int8", "--out", str(tmp_path / "int8")])
    main(["generate", str(tmp_path / "int8"), "--prompt", "the", "--max-tokens", "5", "--temperature", "0"])
    assert retentive.generate(file, prompt="the", max_tokens=5, temperature=0) == shown.removeprefix("the").rstrip("\n")


# files that are refused


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
    with refuses("describes 'gemma'; expected Llama's layout: llama, qwen2, qwen3"):
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
    with refuses("its tokenizer splits words by 'tekken' (supported: gpt-2, smollm, llama-bpe, qwen2, default)"):
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
