"""Writes a model folder in another layout, tensor by tensor where layouts differ in names alone.

convert("path/to/weights", Path("runs/mine"), "retentive")

Then no more than one tensor is in memory, however large the model is. Layouts that compute something of the weights, or
a dtype, an adapter or a window that is to be applied, load the model as a whole.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from retentive.checkpoint.folder import FOREIGN, FORMAT, ModelFolder
from retentive.checkpoint.save import save_model, save_words
from retentive.checkpoint.weights import Unfilled, check_fit, files_of
from retentive.files import load_tensors, naming, opened_tensors, replace_folder, write_text
from retentive.models import build

NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
}
"""Dtypes of tensors that are copied, by their names in safetensors."""
Progress = Callable[[str, int, int | None], object]


class Copied(NamedTuple):
    """A tensor of the new folder."""

    name: str
    source: str
    """Its name in the old folder."""
    file: Path
    like: Tensor
    """Shape and dtype, without memory."""


def convert(
    source: str | Path | ModelFolder,
    out: Path,
    layout: str = "retentive",
    *,
    adapter: "str | Path | ModelFolder | None" = None,
    progress: Progress = lambda stage, done, total: None,
) -> None:
    """Writes a model folder in another layout, in a new folder, as a whole or not at all.

    Args:
        layout: "retentive" or one of FOREIGN.
        adapter: adapter of the model to merge.
        progress: called with what is done, the bytes written, and all bytes.

    Raises:
        FileExistsError: `out` exists.
        ValueError: the architecture cannot be expressed in the layout (the message names all fields that differ), or
            the weights do not fit the config.
        OSError: the disk has too little room, or the folder cannot be written.
    """
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out} exists: choose another folder, nothing is overwritten")
    folder = ModelFolder.open(source)
    change = None if adapter is None else ModelFolder.open(adapter)
    plan = None if change else copies(folder, layout)
    if plan is None:
        model, template = folder.model(adapter=change), (change or folder).template_source
        replace_folder(out, lambda new: save_model(new, model, folder.tokenizer, template=template, layout=layout))
        return
    check_room(out, sum(copied.like.nbytes for copied in plan))
    check_sums(plan)

    def write(new: Path) -> None:
        raw = FOREIGN[layout].write_config(folder.config) if layout in FOREIGN else described(folder)
        write_text(new / "config.json", json.dumps(raw, indent=2) + "\n")
        with open(new / "model.safetensors", "wb") as file:
            copy(plan, file, progress)
        save_words(new, folder.tokenizer, folder.template_source)

    with naming(out):
        replace_folder(out, write)


def described(folder: ModelFolder) -> dict[str, object]:
    """Returns the content of our config.json for a folder of floats."""
    return {"format": FORMAT, "config": folder.config.written()}


def copies(folder: ModelFolder, layout: str) -> list[Copied] | None:
    """Returns the tensors of a folder under the names of a layout; None if they are not merely renamed.

    Raises:
        ValueError: the weights do not fit the config, or the layout cannot express it.
    """
    special = folder.gguf or folder.adapter or folder.quantization or folder.encoders or folder.config.library
    if special or folder.limits != (None, None) or folder.untrained:
        return None
    found, files = dict[str, Tensor](), dict[str, Path]()
    for file in files_of(folder.path):
        with opened_tensors(file) as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                part = opened.get_slice(name)
                dtype = next((dtype for dtype, known in NAMES.items() if known == part.get_dtype()), None)
                if dtype is None:
                    return None
                found[name], files[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta"), file
    names = {id(x): name for name, x in found.items()}
    config = folder.config
    if layout in FOREIGN:
        FOREIGN[layout].write_config(config)  # says what the layout cannot express
    ours = FOREIGN[folder.layout].read_tensors(found, config, folder.raw) if folder.layout in FOREIGN else found
    with Unfilled():
        check_fit(ours, dict(build(config).named_parameters()), folder.name)
    theirs = FOREIGN[layout].write_tensors(ours, config) if layout in FOREIGN else ours
    if any(id(x) not in names for x in theirs.values()) or len({x.dtype for x in theirs.values()}) > 1:
        return None  # computed, or of several dtypes, which `load` decides about
    return [Copied(name, names[id(x)], files[names[id(x)]], x) for name, x in sorted(theirs.items())]


def bytes_of(file: Path, name: str) -> memoryview:
    """Returns the bytes of a tensor. What was read of a file stays in memory while it is open: it is closed again."""
    with opened_tensors(file) as opened:
        return opened.get_tensor(name).clone().flatten().view(torch.uint8).numpy().data


def check_sums(plan: list[Copied]) -> None:
    """Raises ValueError for a file whose bytes are not those of the checksum that it carries."""
    for file in sorted({copied.file for copied in plan}):
        with opened_tensors(file) as opened:
            names, about = sorted(opened.keys()), opened.metadata() or {}
        crc = 0
        for name in names if "crc32" in about else ():
            crc = zlib.crc32(bytes_of(file, name), crc)
        if about.get("crc32", f"{crc:08x}") != f"{crc:08x}":
            raise ValueError(f"{file} is damaged: its bytes are not those that were written, copy or make it again")


def copy(plan: list[Copied], file: BinaryIO, progress: Progress) -> None:
    """Writes a safetensors file, one tensor after the other; the checksum is filled in at the end."""
    header: dict[str, object] = {"__metadata__": {"crc32": "0" * 8, "format": "pt"}}
    at = 0
    for copied in plan:
        x = copied.like
        header[copied.name] = {"dtype": NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [at, at + x.nbytes]}
        at += x.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    crc = done = 0
    for copied in plan:
        data = bytes_of(copied.file, copied.source)
        crc = zlib.crc32(data, crc)
        file.write(data)
        done += copied.like.nbytes
        progress("converting", done, at)
    file.seek(8 + text.index(b'"crc32":"') + len(b'"crc32":"'))
    file.write(f"{crc:08x}".encode())


def check_room(out: Path, nbytes: int) -> None:
    """Raises OSError if the disk has less room, before anything is written."""
    place = next(folder for folder in out.absolute().parents if folder.is_dir())
    if (free := shutil.disk_usage(place).free) < nbytes:
        have = f"{free / 1e6:,.0f} MB are free at {place}, the model takes {nbytes / 1e6:,.0f} MB"
        raise OSError(os.strerror(28) + f": {have}")


@torch.no_grad()
def difference(source: str | Path | ModelFolder, reference: Path) -> float:
    """Returns the largest difference of a model's logits from those of the project that its weights come from.

    Args:
        reference: safetensors file with `input_ids` `[B,T]`, `logits` `[B,T,vocab]` and perhaps `attention_mask`, whose
            padding is not compared.

    Raises:
        ValueError: the file has no such tensors, or of another vocabulary.
    """
    wanted, _ = load_tensors(reference)
    if missing := [name for name in ("input_ids", "logits") if name not in wanted]:
        raise ValueError(
            f"{reference} has no {' and no '.join(missing)}: it needs input_ids and logits of the original"
        )
    model = ModelFolder.open(source).model(dtype=torch.float32)
    ids, logits = wanted["input_ids"], wanted["logits"].float()
    if logits.shape != (*ids.shape, model.config.vocab_size):
        shape = [*ids.shape, model.config.vocab_size]
        raise ValueError(f"{reference} has logits {list(logits.shape)}, the model gives {shape}")
    real = wanted.get("attention_mask", torch.ones_like(ids)).bool()
    first = real.int().argmax(1)
    found, _ = model(ids, lengths=torch.stack((first, first + real.sum(1)), 1))
    return float((found - logits).abs()[real].max())
