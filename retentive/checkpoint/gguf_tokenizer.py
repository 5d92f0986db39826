"""Tokenizers in the metadata of GGUF files, as the tokenizer.json of Hugging Face tokenizers. Kinds that are read:

gpt2      byte-level BPE with merges; `tokenizer.ggml.pre` names the split into words before merging
llama     SentencePiece's BPE: pieces with scores, unknown characters as bytes

Written are byte-level BPE and plain bytes, which are one without merges.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from retentive.data.tokenizer import END_OF_TEXT, BPETokenizer, Tokenizer, byte_letters

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Values of tokenizer.ggml.token_type."""
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS: dict[str, tuple[str, ...]] = {
    "gpt-2": (GPT2,),
    "trillion": (GPT2,),
    "smollm": (r"\p{N}", GPT2),
    "llama-bpe": (WORDS.format(digits=r"\p{N}{1,3}"),),
    "qwen2": (WORDS.format(digits=r"\p{N}"),),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
"""Regular expressions by the name in tokenizer.ggml.pre, each splitting the pieces of the one before."""
WRITTEN = {True: "smollm", False: "trillion"}
"""Names of GPT-2's split, by whether every digit is a word of its own. Under its other names, gpt-2 and starcoder,
llama.cpp drops spaces before punctuation when it decodes."""
DIGITS = {"type": "Digits", "individual_digits": True}
NO_MERGES = ["none none"]
"""List for a tokenizer without merges: llama.cpp refuses an empty one, and this joins tokens that do not exist."""
SPACE = "\u2581"
"""SentencePiece's space."""


def read_tokenizer(fields: Mapping[str, Any]) -> BPETokenizer | None:
    """Returns the tokenizer in a file's metadata; None without one.

    Raises:
        ValueError: its kind is not read, or its lists are damaged.
    """
    kind = fields.get("tokenizer.ggml.model", "none")
    if kind == "none":
        return None
    make = {"gpt2": _byte_level, "llama": _sentencepiece}.get(kind)
    if make is None:
        raise ValueError(f"its tokenizer is of kind {kind!r} (supported: gpt2, llama): pass another as `tokenizer`")
    tokens = _list(fields, "tokens")
    types = _list(fields, "token_type", [NORMAL] * len(tokens))
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ValueError(f"its tokenizer is damaged: {len(tokens):,} tokens, some twice or without a type")
    # padding of the embedding has names as [PAD1], which are no text
    vocab = {token: id for id, (token, type) in enumerate(zip(tokens, types, strict=True)) if type != UNUSED}
    added = [
        {"id": id, "content": token, "special": types[id] != USER_DEFINED, "normalized": False,
         "single_word": False, "lstrip": False, "rstrip": False}
        for token, id in vocab.items()
        if types[id] in (UNKNOWN, CONTROL, USER_DEFINED)
    ]  # fmt: skip
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "post_processor": None}
    text = json.dumps({**content, **make(fields, vocab, types)}, ensure_ascii=False)
    return BPETokenizer(text, eos=token_of(fields, "eos"), bos=token_of(fields, "bos"))


def written(tokenizer: Tokenizer, vocab_size: int, template: str | None) -> dict[str, Any]:
    """Returns the metadata of a tokenizer and its chat template, by key.

    Raises:
        ValueError: llama.cpp has no name for its kind, or for its split of words.
    """
    vocabulary = tokenizer.vocabulary()
    if isinstance(vocabulary, str):
        content = json.loads(vocabulary)
        names = {id: name for name, id in content["model"]["vocab"].items()}
        merges = [x if isinstance(x, str) else " ".join(x) for x in content["model"].get("merges", [])]
        pre = WRITTEN[_splits_digits(content)]
    elif all(len(x) == 1 for x in vocabulary.values()):
        letters = byte_letters()
        names, merges, pre = {id: letters[x[0]] for id, x in vocabulary.items()}, [], WRITTEN[False]
    else:
        raise ValueError("llama.cpp reads byte-level BPE of Hugging Face tokenizers and bytes: this is tiktoken's")
    control = dict(tokenizer.special) or {END_OF_TEXT: tokenizer.eos_id}
    names |= {id: name for name, id in control.items()}
    types = {**dict.fromkeys(names, NORMAL), **dict.fromkeys(control.values(), CONTROL)}
    found: dict[str, Any] = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [names.get(id, f"[PAD{id}]") for id in range(vocab_size)],
        "token_type": [types.get(id, UNUSED) for id in range(vocab_size)],
        "merges": merges or NO_MERGES,
        "eos_token_id": tokenizer.eos_id,
        "bos_token_id": tokenizer.eos_id,
        "add_bos_token": False,
        "add_eos_token": False,
        "add_space_prefix": False,
    }
    words = {f"tokenizer.ggml.{name}": value for name, value in found.items()}
    return words if template is None else {**words, "tokenizer.chat_template": template}


def add_metadata(out: Any, metadata: Mapping[str, Any]) -> None:
    """Adds values to a GGUFWriter, each with the type that it has in Python: uint32, float32, bool, string or array."""
    add = {str: out.add_string, bool: out.add_bool, int: out.add_uint32, float: out.add_float32, list: out.add_array}
    for key, value in metadata.items():
        add[value.__class__](key, value)


def _splits_digits(content: Mapping[str, Any]) -> bool:
    """True if every digit is a word of its own; raises ValueError if words are not split as GPT-2 does otherwise."""
    pre = content.get("pre_tokenizer") or {}
    parts = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    patterns = [part.get("pattern", {}).get("Regex") for part in parts]
    if patterns[:-1] in ([r"\p{N}", GPT2], [GPT2]) and parts[-1].get("type") == "ByteLevel":  # read from a GGUF file
        digits, known = len(parts) == 3, True
    else:
        digits = parts[0] == DIGITS
        known = len(parts) == 1 + digits and parts[-1].get("type") == "ByteLevel" and parts[-1].get("use_regex", True)
    if (
        content["model"].get("type") != "BPE"
        or content.get("normalizer")
        or not known
        or parts[-1].get("add_prefix_space", True)
    ):
        raise ValueError("llama.cpp has no name for how this tokenizer splits words: expected GPT-2's byte-level BPE")
    return digits


def token_of(fields: Mapping[str, Any], name: str) -> str | None:
    """Returns the token with a role, "bos" or "eos"; None if the metadata name none.

    Raises:
        ValueError: the vocabulary does not hold it.
    """
    id, tokens = fields.get(f"tokenizer.ggml.{name}_token_id"), fields.get("tokenizer.ggml.tokens", [])
    if id is not None and not 0 <= id < len(tokens):
        raise ValueError(f"its {name}_token_id {id} is none of its {len(tokens):,} tokens: damaged")
    return None if id is None else tokens[id]


def _byte_level(fields: Mapping[str, Any], vocab: Mapping[str, int], types: Sequence[int]) -> dict[str, Any]:
    """Returns the parts of tokenizer.json for a byte-level BPE."""
    pre = fields.get("tokenizer.ggml.pre", "default")
    if pre not in PATTERNS:
        raise ValueError(f"its tokenizer splits words by {pre!r} (supported: {', '.join(PATTERNS)}): pass `tokenizer`")
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in PATTERNS[pre]
    ]
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    merges = [merge.split(" ") for merge in _list(fields, "merges") if merge not in NO_MERGES]
    return {
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, to_bytes]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": _bpe(vocab, merges, ignore_merges=pre == "llama-bpe"),
    }


def _sentencepiece(fields: Mapping[str, Any], vocab: Mapping[str, int], types: Sequence[int]) -> dict[str, Any]:
    """Returns the parts of tokenizer.json for SentencePiece's BPE."""
    scores = _list(fields, "scores")
    if len(scores) != len(types):
        raise ValueError(f"its tokenizer is damaged: {len(types):,} tokens and {len(scores):,} scores")
    prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    steps = [{"type": "Prepend", "prepend": SPACE}, spaces] if prefix else [spaces]
    unknown = next((token for token, id in vocab.items() if types[id] == UNKNOWN), None)
    back: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": back},
        "model": _bpe(vocab, _merges(vocab, types, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True),
    }


def _merges(vocab: Mapping[str, int], types: Sequence[int], scores: Sequence[float]) -> list[list[str]]:
    """Returns the merges of a vocabulary with scores: each way to make a piece of two others, the best pieces first."""
    normal = {token: id for token, id in vocab.items() if types[id] == NORMAL}
    found = []
    for token, id in normal.items():
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(normal[a], normal[b], a, b) for a, b in halves if a in normal and b in normal]
        found += [(-scores[id], *each) for each in sorted(known)]
    return [[a, b] for *_, a, b in sorted(found, key=lambda each: each[0])]


def _bpe(vocab: Mapping[str, int], merges: list[list[str]], **options: Any) -> dict[str, Any]:
    """Returns the model of a tokenizer.json."""
    defaults = {
        "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
    }  # fmt: skip
    return {"type": "BPE", **defaults, **options, "vocab": vocab, "merges": merges}


def _list(fields: Mapping[str, Any], name: str, default: list | None = None) -> list:
    """Returns a list of the metadata; raises ValueError if it is missing."""
    value = fields.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, list):
        raise ValueError(f"its tokenizer has no tokenizer.ggml.{name}: the file is damaged")
    return value
