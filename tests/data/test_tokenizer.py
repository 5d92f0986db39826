"""Text comes back unchanged and streams without half characters; hashes survive save and load."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retentive.data.tokenizer import BPETokenizer, ByteTokenizer, TiktokenTokenizer, load_tokenizer, train_bpe

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "tokenizers"
CORPUS = ["In 1887 the cat — a grey one — sat.\n\nIt said “Miau”, 31 times.\n"] * 8 + [
    "naïve 猫猫猫猫 🙂🙂🙂\r\n\tx == y\n"
] * 4
NASTY = "  leading, <|endoftext|> as text, 2024, tabs\t\t, \r\n\r\n 👩‍👩‍👧 e\u0301 \u0000 \ufffd 漢字 trailing  "

bpe = train_bpe(CORPUS, 300)
tokenizers = pytest.mark.parametrize("tokenizer", [ByteTokenizer(), bpe], ids=["bytes", "bpe"])


def sentencepiece_like() -> BPETokenizer:
    """Word-start marks and byte fallback, as in Llama's and Mistral's tokenizers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁ab"]
    merges = [("▁", "a"), ("▁a", "b")]
    vocab = {piece: n for n, piece in enumerate([*pieces[:-1], "▁ab"])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return BPETokenizer(tokenizer.to_str())


def streamed(tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [stream.push(id) for id in ids] + [stream.flush()]


@tokenizers
@given(text=st.text())
@settings(max_examples=60, deadline=None)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@tokenizers
def test_text_stays_text(tokenizer):
    ids = tokenizer.encode(NASTY)
    assert tokenizer.decode(ids) == NASTY
    assert tokenizer.eos_id not in ids
    assert max(ids) < tokenizer.vocab_size and 0 <= tokenizer.eos_id < tokenizer.vocab_size
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == NASTY
    assert tokenizer.encode_batch([NASTY, "", "x"]) == [ids, [], tokenizer.encode("x")]


@tokenizers
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_stream_joins_to_decode_for_any_ids(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_stream_never_gives_half_a_character():
    assert streamed(ByteTokenizer(), list("a🙂é".encode())) == ["a", "", "", "", "🙂", "", "é", ""]
    assert streamed(ByteTokenizer(), list("🙂".encode())[:3]) == ["", "", "", "\ufffd"]
    emoji = "👩‍👩‍👧 not in the corpus: 🦀"
    ids = bpe.encode(emoji)
    assert len(ids) > len(emoji), "the test needs characters split over tokens"
    assert all("\ufffd" not in piece for piece in streamed(bpe, ids))
    assert "".join(streamed(bpe, ids)) == emoji


def test_stream_can_be_used_again_after_flush():
    stream = ByteTokenizer().stream()
    assert [stream.push(0xC3), stream.flush(), stream.push(0x41), stream.flush()] == ["", "\ufffd", "A", ""]


def test_stream_with_word_start_marks_and_byte_fallback():
    tokenizer = sentencepiece_like()
    text = "ab ab  a 猫 ab猫猫 b"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == text and pieces[0] == "ab" and all("\ufffd" not in piece for piece in pieces)


def test_trained_bpe_splits_digits_and_is_deterministic():
    assert len(bpe.encode("1887")) == 4
    assert train_bpe(CORPUS, 300).sha256 == bpe.sha256
    assert bpe.vocab_size == 300
    assert train_bpe(["abc"], 300).vocab_size == 257, "a pair seen once is not merged"


@tokenizers
def test_hash_outlives_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new")
    for spec in (tmp_path / "new", tmp_path / "new" / "tokenizer.json"):
        loaded = load_tokenizer(spec)
        assert (loaded.sha256, loaded.eos_id, loaded.vocab_size) == (
            tokenizer.sha256,
            tokenizer.eos_id,
            tokenizer.vocab_size,
        )
        assert loaded.encode(NASTY) == tokenizer.encode(NASTY)


def test_hashes_tell_tokenizers_apart(tmp_path):
    other = train_bpe(CORPUS, 280)
    assert len({ByteTokenizer().sha256, bpe.sha256, other.sha256}) == 3
    spaced = json.dumps(json.loads(bpe._text), indent=4)
    assert BPETokenizer(spaced).sha256 == bpe.sha256, "white space in the file means nothing"
    padded = json.loads(bpe._text)
    padded["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    cut = BPETokenizer(json.dumps(padded))
    assert cut.sha256 == bpe.sha256 and cut.encode("a longer text") == bpe.encode("a longer text")


def test_end_of_text_can_be_chosen_and_is_remembered(tmp_path):
    renamed = BPETokenizer(bpe._text.replace("<|endoftext|>", "</s>"))
    assert renamed.eos == "</s>" and renamed.eos_id == bpe.eos_id
    chosen = BPETokenizer(bpe._text, eos="!")
    assert chosen.eos_id != bpe.eos_id and chosen.sha256 != bpe.sha256
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "kept", "eos_token": {"content": "?"}}')
    chosen.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.eos_id, loaded.sha256) == (chosen.eos_id, chosen.sha256)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"] == "kept"
    bpe.save(tmp_path)
    assert load_tokenizer(tmp_path).eos_id == bpe.eos_id, "an older tokenizer_config.json must not win"
    with pytest.raises(ValueError, match=r"no end-of-text token.*<nope>"):
        BPETokenizer(bpe._text, eos="<nope>")
    with pytest.raises(ValueError, match=r"no end-of-text token.*</s>"):
        BPETokenizer(bpe._text.replace("<|endoftext|>", "<other>"))


def test_vocab_size_counts_gaps():
    form = json.loads(bpe._text)
    form["model"]["vocab"]["far away"] = 999
    assert BPETokenizer(json.dumps(form)).vocab_size == 1000


@tokenizers
def test_vocabulary_says_what_every_id_stands_for(tokenizer, tmp_path):
    """Structured output is built from it, without reading the file."""
    vocabulary = tokenizer.vocabulary()
    if isinstance(vocabulary, str):  # Hugging Face's own file, for libraries that parse it
        assert BPETokenizer(vocabulary).sha256 == tokenizer.sha256
    else:
        ids = tokenizer.encode(NASTY)
        assert b"".join(vocabulary[id] for id in ids).decode() == NASTY
        assert set(range(tokenizer.vocab_size)) - vocabulary.keys() == {tokenizer.eos_id}


def test_load_says_what_is_wrong(tmp_path):
    assert isinstance(load_tokenizer("bytes"), ByteTokenizer)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json"):
        load_tokenizer(tmp_path)
    for name, text, message in (
        ("a.json", "not json", "is not JSON"),
        ("b.json", '{"weights": 1}', 'no "model"'),
        ("c.json", "[1]", 'no "model"'),
        ("d.json", '{"model": {"type": "unheard of"}}', "d.json: not a tokenizer.json"),
        ("e.tiktoken", "IQ== 0\nrubbish\n", "e.tiktoken:2 is not a line"),
        ("f.tiktoken", "", "is empty"),
        ("g.json", '{"type": "tiktoken", "ranks": {}}', "g.json is damaged: it says tiktoken"),
        ("h.json", '{"type": "tiktoken", "ranks": {"x": 0}, "pattern": "gpt2", "eos_id": 1}', "h.json is damaged"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            load_tokenizer(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", ["{", "[]", '{"eos_token": 5}', '{"eos_token": {}}'])
def test_a_damaged_config_beside_it_is_named(tmp_path, config, refuses):
    bpe.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(config)
    with refuses(f"{tmp_path}/tokenizer_config.json is damaged"):
        load_tokenizer(tmp_path)


def test_training_refuses_what_cannot_work():
    with pytest.raises(ValueError, match=r"vocab_size=256.*at least 257"):
        train_bpe(CORPUS, 256)
    with pytest.raises(ValueError, match=r"no text to train"):
        train_bpe(["", ""], 300)
    with pytest.raises(ValueError, match=r"^`vocab_size=1000000000`: must be at most 1,048,576$"):
        train_bpe(CORPUS, 10**9)  # for lack of memory the library would end the process


def test_save_leaves_nothing_half_written(tmp_path, monkeypatch):
    bpe.save(tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match=r"No space left"):
        ByteTokenizer().save(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["tokenizer.json"]
    assert (tmp_path / "tokenizer.json").read_bytes() == before


def test_tiktoken(tmp_path):
    pytest.importorskip("tiktoken")
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256, b"the": 257, b" the": 258}
    tokenizer = TiktokenTokenizer(ranks, pattern="gpt2")
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (259, 260)
    assert tokenizer.encode("the the") == [257, 258]
    assert tokenizer.vocabulary()[258] == b" the" and tokenizer.eos_id not in tokenizer.vocabulary()
    assert tokenizer.decode(tokenizer.encode(NASTY)) == NASTY and 259 not in tokenizer.encode(NASTY)
    assert "".join(streamed(tokenizer, [*tokenizer.encode(NASTY), 259])) == NASTY
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.sha256 == tokenizer.sha256 and loaded.encode_batch([NASTY]) == [tokenizer.encode(NASTY)]
    assert TiktokenTokenizer(ranks, pattern="cl100k").sha256 != tokenizer.sha256
    with pytest.raises(ValueError, match=r"unknown tiktoken pattern 'cl100'"):
        TiktokenTokenizer(ranks, pattern="cl100")


def test_tiktoken_missing_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ImportError, match=r"retentive\[tiktoken\]"):
        TiktokenTokenizer({b"a": 0})


FIXTURES = Path(__file__).parent / "fixtures"


def test_a_tokenizer_json_from_elsewhere_keeps_its_ids_and_its_hash():
    """The file was saved by tokenizers 0.23; the hash stored in data and weights must be the same in all versions."""
    kept = load_tokenizer(FIXTURES / "tokenizer.json")
    assert (kept.vocab_size, kept.eos_id) == (290, 0)
    assert kept.sha256 == "6c6bd77ee30ba40e062102044c7369a483216cf325626ec45f61688d1fbf2733"
    # " the garden" takes several merges; digits and unseen characters stay single
    ids = [258, 282, 286, 221, 73, 78, 221, 17, 24, 24, 23, 26, 221, 287, 221, 267, 199]
    assert kept.encode("the garden in 1887: naïve 猫\n") == ids and kept.decode(ids) == "the garden in 1887: naïve 猫\n"
    assert kept.decode(kept.encode(NASTY)) == NASTY and kept.eos_id not in kept.encode(NASTY)


def test_a_tiktoken_file():
    """256 bytes, " the" from "th" and "the", " g", " ga" and "é"."""
    pytest.importorskip("tiktoken")
    words = load_tokenizer(FIXTURES / "words.tiktoken")
    assert (words.vocab_size, words.eos_id) == (263, 262)
    assert words.encode("the gate café") == [257, 260, *b"te", *b" caf", 261]
    assert words.decode(words.encode(NASTY)) == NASTY and words.eos_id not in words.encode(NASTY)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared data")
def test_published_vocabularies():
    gpt2 = load_tokenizer(SHARED / "gpt2")
    assert (gpt2.vocab_size, gpt2.eos_id) == (50257, 50256)
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.decode(gpt2.encode(NASTY)) == NASTY and gpt2.eos_id not in gpt2.encode(NASTY)
    pytest.importorskip("tiktoken")
    cl100k = load_tokenizer(SHARED / "cl100k" / "cl100k_base.tiktoken")
    assert (cl100k.vocab_size, cl100k.eos_id) == (100258, 100257)
    assert cl100k.encode("hello world") == [15339, 1917]
