"""Tokenizers, text to token ids and back: built-in bytes, any Hugging Face tokenizer.json, or tiktoken ranks.

Text stays text: `<|endoftext|>` in a document is encoded as plain characters, never as the special token, and special
tokens decode to nothing. Every tokenizer has a `sha256`, stored with the data and weights made with it. It saves itself
as a `tokenizer.json` that `load_tokenizer` reads back to the same hash.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from retentive.files import write_text
from retentive.options import option, quoted

END_OF_TEXT = "<|endoftext|>"
LARGEST = 1 << 20
"""Maximum vocabulary size of `train_bpe`, four times the largest in use. The library allocates memory for all tokens
at once, and ends the process if there is too little."""
# Names of the end-of-document token in tokenizers, the likeliest first.
END_NAMES = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|end|>",
    "[EOS]",
    "[SEP]",
)

# How OpenAI's vocabularies split text before merging: regular expressions of tiktoken_ext/openai_public.py.
TIKTOKEN_PATTERNS = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
    "cl100k": (
        r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"""
        r"""|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
    ),
}


class TextStream:
    """Incremental decoding: text from ids one by one, never half a character; the pieces join to `decode` of all ids.

    Decodes the ids since the last piece together with those of that piece, the context that tokenizers need which mark
    word starts. Exact for byte-level tokenizers; others may differ if the ids are not valid UTF-8.
    """

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode = decode
        self._start([])

    def _start(self, context: list[int]) -> None:
        self._ids = context  # ids of the last piece; new ids are appended
        self._context = len(context)
        self._text = self._decode(context)

    def push(self, id: int) -> str:
        """Adds an id and returns the text that it completes, often ""."""
        self._ids.append(id)
        text = self._decode(self._ids)
        # An unfinished character decodes to U+FFFD: wait for its rest. Some ids, as special ones, have no text.
        if text.endswith("\ufffd") or len(text) <= len(self._text):
            return ""
        piece = text[len(self._text) :]
        self._start(self._ids[self._context :])
        return piece

    def flush(self) -> str:
        """Returns the remaining text, an unfinished character as U+FFFD, and resets the stream."""
        piece = self._decode(self._ids)[len(self._text) :]
        self._start([])
        return piece


class Tokenizer(Protocol):
    """Interface of all tokenizers; the rest of the package uses nothing else of them."""

    vocab_size: int
    """Highest id plus one: the number of rows an embedding table needs."""
    eos_id: int
    """Id that ends a document."""
    sha256: str
    """Hash of the content, independent of the file's layout: equal before and after `save`."""
    special: Mapping[str, int]
    """Special tokens that its file adds, by name; a chat template may emit them."""

    def encode(self, text: str) -> list[int]:
        """Returns the ids of the text, without special tokens."""
        ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Returns `encode` of each text, using all cores if the library can."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the ids. Special tokens have none; bytes that are not UTF-8 become U+FFFD."""
        ...

    def stream(self) -> TextStream:
        """Returns a decoder for ids that come one by one."""
        ...

    def save(self, folder: str | Path) -> None:
        """Writes it into the folder, so that `load_tokenizer(folder)` has the same `sha256`."""
        ...

    def vocabulary(self) -> dict[int, bytes] | str:
        """Returns id -> bytes without special tokens; for Hugging Face tokenizers the text of tokenizer.json."""
        ...


class ByteTokenizer:
    """The 256 bytes and an end-of-text token: no dependency, no training, lossless."""

    vocab_size = 257
    eos_id = 256
    special: Mapping[str, int] = MappingProxyType({})

    def __init__(self) -> None:
        self._content = {"type": "bytes", "vocab_size": self.vocab_size, "eos_id": self.eos_id}
        self.sha256 = _hash(self._content)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(id for id in ids if id < 256).decode("utf-8", "replace")

    def stream(self) -> TextStream:
        return TextStream(self.decode)

    def save(self, folder: str | Path) -> None:
        _save(Path(folder), json.dumps(self._content))

    def vocabulary(self) -> dict[int, bytes]:
        return {id: bytes([id]) for id in range(256)}


class BPETokenizer:
    """Any Hugging Face tokenizer (BPE, unigram, word pieces), from the text of its tokenizer.json.

    Args:
        eos: name of the token that ends a document; by default the first of END_NAMES in the vocabulary.
        bos: name of the beginning-of-text token, which chat templates may emit; None without one.

    Raises:
        ValueError: the text is no tokenizer.json, or has none of these tokens.
    """

    def __init__(self, text: str, *, eos: str | None = None, bos: str | None = None):
        from tokenizers import Tokenizer as HFTokenizer

        try:
            self._tokenizer = HFTokenizer.from_str(text)
        except Exception as error:  # the Rust library raises bare Exception
            raise ValueError(f"not a tokenizer.json of Hugging Face tokenizers: {quoted(error)}") from None
        self._text = text  # saved unchanged, so that the hash is independent of the library's version
        self.bos = bos
        self.eos, self.eos_id = _end_token(self._tokenizer.token_to_id, eos)
        self._tokenizer.add_special_tokens([self.eos])  # some files hold it as an ordinary token, which decodes to text
        self._tokenizer.encode_special_tokens = True  # text stays text: special tokens' names are encoded as characters
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1  # ids may have gaps
        content = {key: value for key, value in json.loads(text).items() if key not in ("truncation", "padding")}
        added = content.get("added_tokens") or []
        self.special: Mapping[str, int] = {token["content"]: token["id"] for token in added if token.get("special")}
        self.sha256 = _hash({"eos": self.eos, **content})

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [each.ids for each in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def stream(self) -> TextStream:
        return TextStream(self.decode)

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        _save(folder, self._text)
        found = next(name for name in (*END_NAMES, self.eos) if self._tokenizer.token_to_id(name) is not None)
        named = {"eos_token": self.eos} if self.eos != (_configured(folder, "eos_token") or found) else {}
        if self.bos and self.bos != _configured(folder, "bos_token"):
            named["bos_token"] = self.bos
        if named:  # tokenizer.json has no fields for them, so they go where transformers looks as well
            config = folder / "tokenizer_config.json"
            kept = json.loads(config.read_text("utf-8")) if config.exists() else {}
            write_text(config, json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **kept, **named}))

    def vocabulary(self) -> str:
        return self._text


class TiktokenTokenizer:
    """tiktoken's byte-level BPE over a table of ranks, several times faster than Hugging Face's.

    Raises:
        ImportError: the package tiktoken is not installed (extra `tiktoken`).
        ValueError: the pattern is unknown.
    """

    special: Mapping[str, int] = MappingProxyType({})

    def __init__(self, ranks: dict[bytes, int], *, pattern: str = "cl100k", eos_id: int | None = None):
        if pattern not in TIKTOKEN_PATTERNS:
            raise ValueError(f"unknown tiktoken pattern {pattern!r}: expected one of {', '.join(TIKTOKEN_PATTERNS)}")
        try:
            import tiktoken
        except ImportError:
            raise ImportError("a .tiktoken vocabulary needs tiktoken: pip install 'retentive[tiktoken]'") from None
        after = max(ranks.values()) + 1
        # cl100k_base leaves 100256 unused; elsewhere the end-of-text id follows the last rank.
        self.eos_id = eos_id if eos_id is not None else 100257 if after == 100256 else after
        self.vocab_size = max(after, self.eos_id + 1)
        self._content = {
            "type": "tiktoken",
            "pattern": pattern,
            "eos_id": self.eos_id,
            "ranks": {base64.b64encode(token).decode(): rank for token, rank in ranks.items()},
        }
        self.sha256 = _hash(self._content)
        self._vocabulary = {rank: token for token, rank in ranks.items()}
        self._encoding = tiktoken.Encoding(
            self.sha256,
            pat_str=TIKTOKEN_PATTERNS[pattern],
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: self.eos_id},
        )

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._encoding.encode_ordinary_batch(texts)

    def decode(self, ids: Iterable[int]) -> str:
        return self._encoding.decode_bytes([id for id in ids if id in self._vocabulary]).decode("utf-8", "replace")

    def stream(self) -> TextStream:
        return TextStream(self.decode)

    def save(self, folder: str | Path) -> None:
        _save(Path(folder), json.dumps(self._content))

    def vocabulary(self) -> dict[int, bytes]:
        return dict(self._vocabulary)


def byte_letters() -> list[str]:
    """Returns the letter that stands for each byte in byte-level vocabularies (GPT-2)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(others)) for byte in range(256)]


PADDING = 1024
"""Number of rows that an embedding may have beyond its tokenizer, since vocabulary sizes are rounded up."""


def check_tokens(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ValueError if the tokenizer does not fit a model with this vocabulary size."""
    have = tokenizer.vocab_size
    if not have <= vocab_size < have + PADDING:
        raise ValueError(f"the tokenizer has {have:,} tokens, the model {vocab_size:,}: they do not belong together")


def load_tokenizer(spec: str | Path, *, eos: str | None = None, pattern: str = "cl100k") -> Tokenizer:
    """Loads the tokenizer that `spec` names: "bytes", a tokenizer.json, a folder with one, or a .tiktoken file.

    Args:
        eos: end-of-text token of a tokenizer.json, if not the one that its files name.
        pattern: how a .tiktoken file splits words, a key of TIKTOKEN_PATTERNS.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or no tokenizer.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f'no tokenizer at {path}: expected "bytes", a tokenizer.json or its folder, or a .tiktoken file'
        )
    if path.suffix == ".tiktoken":
        return TiktokenTokenizer(_read_ranks(path), pattern=pattern)
    try:
        text = path.read_text("utf-8")
        content = json.loads(text)
    except ValueError:
        raise ValueError(f"{path} is not JSON: expected a tokenizer.json or a file named *.tiktoken") from None
    kind = content.get("type") if isinstance(content, dict) else None
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "tiktoken":
        try:
            ranks = {base64.b64decode(token): int(rank) for token, rank in content["ranks"].items()}
            return TiktokenTokenizer(ranks, pattern=content["pattern"], eos_id=content["eos_id"])
        except (KeyError, TypeError, AttributeError, binascii.Error):
            raise ValueError(f"{path} is damaged: it says tiktoken, but holds no ranks, pattern and eos_id") from None
    if not isinstance(content, dict) or "model" not in content:
        raise ValueError(
            f'{path} is not a tokenizer.json: it has no "model"; expected the file that HF tokenizers saves'
        )
    eos, bos = eos or _configured(path.parent, "eos_token"), _configured(path.parent, "bos_token")
    try:
        return BPETokenizer(text, eos=eos, bos=bos)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Learns a byte-level BPE from `texts`: lossless, with GPT-2's word boundaries and single digits.

    Little text gives fewer than `vocab_size` tokens, since a pair seen only once is not merged.

    Raises:
        ValueError: the size is impossible, or there is no text.
    """
    if vocab_size < 257:
        raise ValueError(f"{option('vocab_size', vocab_size)}: must be at least 257, for the bytes and {END_OF_TEXT}")
    if vocab_size > LARGEST:
        raise ValueError(f"{option('vocab_size', vocab_size)}: must be at most {LARGEST:,}")
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = HFTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, seen or not, to be lossless
        show_progress=False,
    )
    characters = 0

    def counted() -> Iterator[str]:
        nonlocal characters
        for text in texts:
            characters += len(text)
            yield text

    tokenizer.train_from_iterator(counted(), trainer)
    if not characters:
        raise ValueError("no text to train a tokenizer on: every text was empty")
    return BPETokenizer(tokenizer.to_str())


def _save(folder: Path, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "tokenizer.json", text)


def _end_token(token_to_id: Callable[[str], int | None], wanted: str | None) -> tuple[str, int]:
    """Returns (name, id) of the end-of-text token: the wanted one, else the first of END_NAMES that exists."""
    names = END_NAMES if wanted is None else (wanted,)
    for name in names:
        if (id := token_to_id(name)) is not None:
            return name, id
    raise ValueError(f"no end-of-text token in the vocabulary: looked for {', '.join(names)}; name yours with eos=")


def _configured(folder: Path, name: str) -> str | None:
    """Returns the token with a role that tokenizer_config.json in `folder` names, as a string or as an object."""
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        return None
    try:
        token = json.loads(config.read_text("utf-8")).get(name)
        token = token["content"] if isinstance(token, dict) else token
        if token is None or isinstance(token, str):
            return token
    except (ValueError, KeyError, AttributeError):
        pass
    raise ValueError(f"{config} is damaged: expected a JSON object whose {name} is a string or has a content")


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Reads bytes -> rank from the lines of a .tiktoken file."""
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"{path}:{number} is not a line of a .tiktoken file: expected base64, space, rank"
            ) from None
    if not ranks:
        raise ValueError(f"{path} is empty: expected lines of base64, space, rank")
    return ranks


def _hash(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
