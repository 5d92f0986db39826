"""Writes folders that `AutoModelForCausalLM.from_pretrained` loads, with or without this package.

config.json, model.safetensors, modeling_retentive.py       the model and its classes
tokenizer.json, tokenizer_config.json, chat_template.jinja  its words
generation_config.json, README.md                           how it writes, and the model card
"""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers.utils import logging

from retentive.checkpoint import ModelFolder, hf
from retentive.checkpoint.quantize import float_tensors, quantization_of
from retentive.data.templates import TEMPLATE
from retentive.data.tokenizer import END_OF_TEXT, BPETokenizer, ByteTokenizer, Tokenizer, byte_letters
from retentive.files import naming, only_writer, replace_folder, save_tensors, write_json, write_text
from retentive.hf.modeling_retentive import RetentiveForCausalLM
from retentive.models import LanguageModel, cost
from retentive.tables import counted, millions

MODELING = Path(__file__).with_name("modeling_retentive.py")
CARD = Path(__file__).with_name("card.md")
"""Model card with gaps in braces."""
UNKNOWN = (
    "## Data, numbers, limits, licence\n\nNot recorded in the model's folder: write them here before you publish it.\n"
)
"""Section of the model card where the model's folder holds no card."""
AUTO = {
    "AutoConfig": "RetentiveConfig",
    "AutoModel": "RetentiveModel",
    "AutoModelForCausalLM": "RetentiveForCausalLM",
    "AutoModelForSequenceClassification": "RetentiveForSequenceClassification",
}
"""Classes of MODELING by the class of transformers that finds them."""
PADDING = ("<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|endoftext|>", "<unk>")
"""Tokens that may stand for padding, if the vocabulary has them and they do not end a text."""
CHECKED, FAR, FAR_OF_INTEGERS = 48, 1e-3, 0.05
"""Tokens on which logits are compared, and the largest difference, relative to their size. Integers are written as
bfloat16, which rounds them once more."""
Far = TypeVar("Far", float, float | None)
TARGETS = ("q_proj", "k_proj", "v_proj", "g_proj", "out_proj", "gate_proj", "up_proj", "down_proj")
"""Matrices that LoRA changes."""


def to_hf(source: str | Path | ModelFolder, out: Path, *, tokenizer: str | Tokenizer | None = None) -> float:
    """Writes a model for transformers, in a new folder, as a whole or not at all.

    Integer weights are written as the floats that they stand for.

    Args:
        tokenizer: tokenizer for a model without one.

    Returns:
        The largest difference of the logits from the model's, relative to their size.

    Raises:
        FileExistsError: `out` exists.
        ValueError: the model is a peer, or reads pictures or sound; or transformers computes other logits.
    """

    def finish(path: Path, folder: ModelFolder, model: LanguageModel, config: dict[str, Any]) -> float:
        auto = {name: f"{MODELING.stem}.{own}" for name, own in AUTO.items()}
        write_json(path / "config.json", {**config, "architectures": [AUTO["AutoModelForCausalLM"]], "auto_map": auto})
        shutil.copyfile(MODELING, path / MODELING.name)
        write_text(path / "README.md", card(CARD, folder, model))
        return difference(path, model)

    return write_folder(source, out, finish, tokenizer=tokenizer)


Finish = Callable[[Path, ModelFolder, LanguageModel, dict[str, Any]], Far]
"""Function that writes config.json from its fields, classes and card, and returns the difference of the logits."""


def write_folder(
    source: str | Path | ModelFolder, out: Path, finish: Finish[Far], *, tokenizer: str | Tokenizer | None
) -> Far:
    """Writes weights and words, and calls `finish`, in a new folder, as a whole or not at all; raises as `to_hf`."""
    with only_writer(out):
        if out.exists() or out.is_symlink():
            raise FileExistsError(f"{out} exists: choose another folder, nothing is overwritten")
        folder = ModelFolder.open(source)
        if folder.config.library:
            raise ValueError(f"{folder.name} is a model of {folder.config.library} already")
        if folder.encoders:
            raise ValueError(
                f"{folder.name} reads {', '.join(folder.encoders)}, and such folders hold text models alone"
            )
        words, model = folder.tokenizer_for_text(tokenizer), folder.model()
        how = special_tokens(folder, words)
        far: list[Far] = []

        def write(path: Path) -> None:
            config = write_model(path, model, how)
            write_words(path, words, folder.template_source, how)
            far.append(finish(path, folder, model, config))

        with naming(out):
            replace_folder(out, write)
    return far[0]


class Special(NamedTuple):
    """Special tokens of a model, by name and id."""

    eos: str
    eos_id: int
    pad: str
    pad_id: int
    stops: tuple[int, ...]
    """Ids that end a text or an answer."""


def special_tokens(folder: ModelFolder, words: Tokenizer) -> Special:
    """Returns the tokens that a folder's files name."""
    eos = words.eos if isinstance(words, BPETokenizer) else END_OF_TEXT
    pad = next((name for name in PADDING if name in words.special and name != eos), eos)
    stops = {words.eos_id, *folder.template(words).stop_ids} if folder.template_source else {words.eos_id}
    return Special(eos, words.eos_id, pad, words.special.get(pad, words.eos_id), tuple(sorted(stops)))


def write_model(path: Path, model: LanguageModel, how: Special) -> dict[str, Any]:
    """Writes the weights and the config of `generate`; returns the fields of config.json."""
    floats = {name: x.cpu().contiguous() for name, x in float_tensors(model).items()}
    tensors = hf.write_tensors(floats, model.config)
    save_tensors(path / "model.safetensors", tensors, {"format": "pt"})
    ids = {"bos_token_id": how.eos_id, "eos_token_id": how.eos_id, "pad_token_id": how.pad_id}
    write_json(path / "generation_config.json", {**ids, "eos_token_id": list(how.stops)})
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    return {**hf.write_config(model.config), "dtype": dtype, **ids}


def write_words(path: Path, words: Tokenizer, template: str | None, how: Special) -> None:
    """Writes the tokenizer as transformers reads it, and the chat template if there is one."""
    content = tokenizer_json(words)
    if (content.get("post_processor") or {"type": "ByteLevel"})["type"] == "ByteLevel":
        content["post_processor"] = begins_with(how.eos, how.eos_id)
    write_text(path / "tokenizer.json", json.dumps(content, ensure_ascii=False))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": how.eos,
        "eos_token": how.eos,
        "pad_token": how.pad,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    write_json(path / "tokenizer_config.json", about)
    if template is not None:
        write_text(path / TEMPLATE, template)


def tokenizer_json(words: Tokenizer) -> dict[str, Any]:
    """Returns the content of a tokenizer.json of Hugging Face tokenizers.

    Raises:
        ValueError: the tokenizer is tiktoken's.
    """
    known = words.vocabulary()
    if isinstance(known, str):
        return json.loads(known) | {"truncation": None, "padding": None}
    if not isinstance(words, ByteTokenizer):
        raise ValueError("a vocabulary of tiktoken cannot be written for transformers: train with a tokenizer.json")
    end = {"id": words.eos_id, "content": END_OF_TEXT, "special": True}
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [end], "normalizer": None,
        "pre_tokenizer": level, "post_processor": None, "decoder": level,
        "model": {"type": "BPE", "vocab": {letter: byte for byte, letter in enumerate(byte_letters())}, "merges": []},
    }  # fmt: skip


def begins_with(token: str, id: int) -> dict[str, Any]:
    """Returns a post-processor that puts a token before every text, as before every document in training."""
    special, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    other = {"Sequence": {"id": "B", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text, other],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    }


def difference(path: Path, model: LanguageModel) -> float:
    """Returns the largest difference of transformers' logits from the model's; errors as `compared`."""
    with quiet():
        theirs = RetentiveForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return compared("transformers", lambda ids: theirs(ids).logits, model)


@torch.no_grad()
def compared(library: str, logits: Callable[[Tensor], Tensor], model: LanguageModel) -> float:
    """Returns the largest difference of a library's logits from the model's, relative to their size.

    Raises:
        ValueError: it is too large.
    """
    ids = torch.randint(model.config.vocab_size, (1, CHECKED), generator=torch.Generator().manual_seed(0))
    want = copy.deepcopy(model).float().eval()(ids)[0]
    far = float((logits(ids) - want).abs().max() / want.abs().max())
    if not far <= (FAR_OF_INTEGERS if quantization_of(model) else FAR):  # NaN neither
        raise ValueError(
            f"the logits of {library} differ from the model's by {far:.1e} of their size: nothing is written"
        )
    return far


@contextmanager
def quiet() -> Iterator[None]:
    """Hides the progress bar of transformers' loading in this block."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def card(gaps: Path, folder: ModelFolder, model: LanguageModel) -> str:
    """Returns the model card: how to use it, in a file with gaps, then the folder's own card if there is one."""
    c: Any = model.config
    own = folder.path / "README.md"
    grows = "of constant size" if c.constant_state else "that grows with the text"
    told = own.read_text(encoding="utf-8") if own.is_file() and not folder.gguf else UNKNOWN
    targets = ", ".join(f'"{name}"' for name in TARGETS)
    return gaps.read_text(encoding="utf-8").format(
        name=folder.short_name, kind=c.name, parameters=millions(cost.parameters(c)), blocks=counted(c.layers, "block"),
        state=grows, targets=targets, own=told,
    )  # fmt: skip
