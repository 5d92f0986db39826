"""Folder with a model for another runtime, its tokenizer and chat template, checked against the source model.

export("runs/novels", "onnx", Path("novels"), weights="int4")
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from retentive.checkpoint import ModelFolder, save_model
from retentive.checkpoint.quantize import BITS, quantization_of, quantize
from retentive.data.templates import TEMPLATE
from retentive.data.tokenizer import Tokenizer
from retentive.export import browser, native, onnx
from retentive.files import naming, only_writer, replace_folder, write_text
from retentive.models import LanguageModel

FILES = {"onnx": "model.onnx", "native": "model", "browser": "model"}
"""Model within the folder; a folder itself for native and browser."""
CHECKED = 48
"""Tokens read to compare the export with the model."""
FAR, FAR_OF_INTEGERS = 1e-3, 0.1
"""Tolerance of logits, relative to their size. With integer weights it is larger, since other runtimes round the inputs
to 8 bits too."""

Read = Callable[[Sequence[int]], np.ndarray]
"""Function that reads more ids of one sequence and returns the logits."""


class Exported(NamedTuple):
    """Result of an export."""

    file: Path
    nbytes: int
    off: float | None
    """Largest difference from the model's logits, relative to their size; None without the C compiler that it needs."""


def export(
    source: str | Path | ModelFolder,
    to: str,
    out: Path,
    *,
    weights: str = "stored",
    standard: bool = False,
    tokenizer: str | None = None,
) -> Exported:
    """Writes the model of a folder for another runtime, in a new folder, as a whole or not at all.

    Args:
        to: one of FILES.
        weights: "stored", "int8" or "int4".
        standard: use only standard operators of ONNX (see `export_onnx`).
        tokenizer: tokenizer for a model without one.

    Raises:
        FileExistsError: `out` exists.
        OSError: the disk has too little room.
        ValueError: the model cannot be exported, its export gives other logits, or `standard` is set without ONNX.
        ImportError: the extra of that runtime is missing.
    """
    if standard and to != "onnx":
        raise ValueError("`standard=True` is for `to='onnx'`; leave it out")
    with only_writer(out):
        if out.exists() or out.is_symlink():
            raise FileExistsError(f"{out} exists: choose another folder, nothing is overwritten")
        given = ModelFolder.open(source)
        own, model = given.tokenizer_for_text(tokenizer), given.model()
        check_room(out, model, weights)
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
            far.append(to_onnx(model, path, own.eos_id, weights, standard))
            own.save(folder)
            if template is not None:
                write_text(folder / TEMPLATE, template)

        with naming(out):
            replace_folder(out, write)
    made = out / FILES[to]
    files = [f for f in out.rglob("*") if f.is_file() and f.relative_to(out).parts[0].startswith(made.name)]
    return Exported(made, sum(f.stat().st_size for f in files), far[0])


def check_room(out: Path, model: LanguageModel, weights: str) -> None:
    """Raises OSError if the disk has less room than the weights need, before anything is written."""
    how = quantization_of(model)
    bits = BITS.get(weights, how.bits if how else 16)
    least = sum(p.numel() for p in model.parameters()) * bits // 8
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
    exact = quantization_of(model) is None
    return difference(reading(model), OnnxModel(path).read, model.config.vocab_size, exact=exact)


def to_c(model: LanguageModel, folder: Path, tokenizer: Tokenizer, template: str | None, weights: str) -> float | None:
    """Writes the model for C and returns the difference of the logits from the model's, as read by C."""
    native.check_exportable(model)
    if weights != "stored":
        model = quantize(model, BITS[weights], dtype=model.dtype)  # few phones compute in bfloat16
    save_model(folder, model, tokenizer, template=template)
    exact = model.dtype == torch.float32 and quantization_of(model) is None
    with native.opened(folder) as library:
        if library is None:
            return None
        native.check_words(library, tokenizer)
        return difference(reading(model.float().eval()), library.read, model.config.vocab_size, exact=exact)


def reading(model: LanguageModel) -> Read:
    """Returns the `Read` of a model itself."""
    state: Any = None

    @torch.no_grad()
    def read(ids: Sequence[int]) -> np.ndarray:
        nonlocal state
        logits, state = model(torch.tensor([ids]), state)
        return logits[0, -1].numpy()

    return read


def difference(wanted: Read, got: Read, vocab_size: int, *, exact: bool) -> float:
    """Returns the largest difference of logits relative to their size, after a prompt and token by token.

    Raises:
        ValueError: the difference is too large, perhaps by another version of the runtime.
    """
    ids = [int(n) for n in np.random.default_rng(0).integers(0, vocab_size, CHECKED)]
    off, half = [], CHECKED // 2
    for part in (ids[:half], *([id] for id in ids[half:])):
        logits = wanted(part)
        if not np.isfinite(logits).all():
            raise ValueError("the model's logits are not finite: nothing is written")
        off.append(np.abs(got(part) - logits).max() / np.abs(logits).max())
    worst = float(np.max(off))  # NaN if there is one
    if not worst <= (FAR if exact else FAR_OF_INTEGERS):
        raise ValueError(
            f"the export's logits differ from the model's by {worst:.1e} of their size: nothing is written"
        )
    return worst
