"""Folder with a model for another runtime, its tokenizer and chat template, checked against the source model.

export("runs/novels", "onnx", Path("novels"), weights="int4")
"""

import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from retentive.checkpoint import ModelFolder, save_model
from retentive.checkpoint.quantize import BITS, quantization_of, quantize
from retentive.data.prepare import Progress
from retentive.data.templates import TEMPLATE
from retentive.data.tokenizer import Tokenizer
from retentive.export import browser, gguf, native, onnx
from retentive.files import naming, only_writer, replace_folder, write_text
from retentive.models import LanguageModel
from retentive.options import option

FILES = {"onnx": "model.onnx", "native": "model", "browser": "model", "gguf": "model.gguf"}
"""Model within the folder; a folder itself for native and browser."""
CHECKED = 48
"""Tokens read to compare the export with the model."""
FAR, FAR_OF_HALVES, FAR_OF_INTEGERS, FAR_OF_LLAMA = 1e-3, 2e-2, 0.1, 0.4
"""Tolerance of logits, relative to their size. With halves as weights it is larger, since llama.cpp rounds the inputs
to halves too; with integers, since runtimes round the inputs to 8 bits, and llama.cpp those of the state as well. Large
random weights come to 0.15 there, a wrong tensor to 1."""

Read = Callable[[Sequence[int]], np.ndarray]
"""Function that reads more ids of one sequence and returns the logits."""


class Exported(NamedTuple):
    """Result of an export."""

    file: Path
    nbytes: int
    off: float | None
    """Largest difference from the model's logits, relative to their size; None without the C compiler, or the package
    llama-cpp-python, that it needs."""


def export(
    source: str | Path | ModelFolder,
    to: str,
    out: Path,
    *,
    weights: str = "stored",
    standard: bool = False,
    type: gguf.Type | None = None,
    tokenizer: str | Tokenizer | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Writes the model of a folder for another runtime, in a new folder, as a whole or not at all.

    Args:
        to: one of FILES.
        weights: "stored", "int8" or "int4".
        standard: use only standard operators of ONNX (see `export_onnx`).
        type: of the matrices of a GGUF file; f16 if not given.
        tokenizer: tokenizer for a model without one.
        progress: called while a GGUF file is written.

    Raises:
        FileExistsError: `out` exists.
        OSError: the disk has too little room.
        ValueError: the model cannot be exported, its export gives other logits, or `standard` is set without ONNX.
        ImportError: the extra of that runtime is missing.
    """
    if standard and to != "onnx":
        raise ValueError("`standard=True` is for `to='onnx'`; leave it out")
    if to == "gguf" and weights != "stored":
        raise ValueError(f"{option('weights', weights)}: a GGUF file has integers of its own: choose a `type`")
    if type and to != "gguf":
        raise ValueError(f"{option('type', type)} is for `to='gguf'`; leave it out")
    with only_writer(out):
        if out.exists() or out.is_symlink():
            raise FileExistsError(f"{out} exists: choose another folder, nothing is overwritten")
        given = ModelFolder.open(source)
        own, model = given.tokenizer_for_text(tokenizer), given.model()
        check_room(out, model, gguf.BITS[type or "f16"] if to == "gguf" else BITS.get(weights))
        template, far = given.template_source, list[float | None]()

        def write(folder: Path) -> None:
            path = folder / FILES[to]
            if to in ("native", "browser"):
                far.append(to_c(model, path, own, template, weights))
                if to == "native":
                    native.write_sources(folder)
                else:
                    browser.write_page(folder, own, name=given.short_name)
                return
            if to == "gguf":
                how = {"name": given.short_name, "template": template, "progress": progress}
                far.append(to_gguf(model, path, own, type or "f16", **how))
                return
            far.append(to_onnx(model, path, own.eos_id, weights, standard))
            own.save(folder)
            if template is not None:
                write_text(folder / TEMPLATE, template)

        with naming(out):
            replace_folder(out, write)
    made = out / FILES[to]
    files = [f for f in out.rglob("*") if f.is_file() and f.relative_to(out).parts[0].startswith(made.name)]
    return Exported(made, sum(f.stat().st_size for f in files), far[0])


def check_room(out: Path, model: LanguageModel, bits: float | None = None) -> None:
    """Raises OSError if the disk has less room than the weights need, before anything is written.

    Args:
        bits: of each number; by default those that the model has, or 16.
    """
    how = quantization_of(model)
    bits = bits or (how.bits if how else 16)
    least = sum(p.numel() for p in model.parameters()) * bits / 8
    place = next(folder for folder in out.absolute().parents if folder.is_dir())
    if (free := shutil.disk_usage(place).free) < least:
        have = f"{free / 1e6:,.0f} MB are free at {place}, the export takes {least / 1e6:,.0f} MB at least"
        raise OSError(f"{have}; choose another folder" + ("" if how else ", or fewer bits (`weights`)"))


def to_onnx(model: LanguageModel, path: Path, eos: int, weights: str, standard: bool) -> float:
    """Writes the graph and returns the difference of its logits from the (quantised) model's."""
    from retentive.export.onnx_run import OnnxModel

    onnx.check_exportable(model)
    if weights != "stored":
        model = quantize(model, BITS[weights])
    model = model.float().eval()
    onnx.export_onnx(model, path, eos=eos, standard=standard)
    far = FAR_OF_INTEGERS if quantization_of(model) else FAR
    return difference(reading(model), OnnxModel(path).read, model.config.vocab_size, far)


def to_c(model: LanguageModel, folder: Path, tokenizer: Tokenizer, template: str | None, weights: str) -> float | None:
    """Writes the model for C and returns the difference of the logits from the model's, as read by C."""
    native.check_exportable(model)
    if weights != "stored":
        model = quantize(model, BITS[weights], dtype=model.dtype)  # few phones compute in bfloat16
    save_model(folder, model, tokenizer, template=template)
    far = FAR if model.dtype == torch.float32 and quantization_of(model) is None else FAR_OF_INTEGERS
    with native.opened(folder) as library:
        if library is None:
            return None
        native.check_words(library, tokenizer)
        return difference(reading(model.float().eval()), library.read, model.config.vocab_size, far)


def to_gguf(model: LanguageModel, path: Path, tokenizer: Tokenizer, type: gguf.Type, **words: Any) -> float | None:
    """Writes the file, and returns the difference of llama.cpp's logits from the model's; if the file holds integers,
    from those of the file as it is read back."""
    gguf.write(model, path, tokenizer, type=type, **words)
    if find_spec("llama_cpp") is None:
        return None
    far = {"f32": FAR, "f16": FAR_OF_HALVES}.get(type, FAR_OF_LLAMA)
    wanted = model.float().eval() if type[0] == "f" else ModelFolder.open(path).model(dtype=torch.float32)
    with closing(gguf.LlamaCpp(path)) as there:
        return difference(reading(wanted), there.read, model.config.vocab_size, far)


def reading(model: LanguageModel) -> Read:
    """Returns the `Read` of a model itself."""
    state: Any = None

    @torch.no_grad()
    def read(ids: Sequence[int]) -> np.ndarray:
        nonlocal state
        logits, state = model(torch.tensor([ids]), state)
        return logits[0, -1].numpy()

    return read


def difference(wanted: Read, got: Read, vocab_size: int, far: float) -> float:
    """Returns the largest difference of logits relative to their size, after a prompt and token by token.

    Raises:
        ValueError: the difference is above `far`, perhaps by another version of the runtime.
    """
    ids = [int(n) for n in np.random.default_rng(0).integers(0, vocab_size, CHECKED)]
    off, half = [], CHECKED // 2
    for part in (ids[:half], *([id] for id in ids[half:])):
        logits = wanted(part)
        if not np.isfinite(logits).all():
            raise ValueError("the model's logits are not finite: nothing is written")
        off.append(np.abs(got(part) - logits).max() / np.abs(logits).max())
    worst = float(np.max(off))  # NaN if there is one
    if not worst <= far:
        raise ValueError(
            f"the export's logits differ from the model's by {worst:.1e} of their size: nothing is written"
        )
    return worst
