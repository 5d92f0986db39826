"""A folder with a model for another runtime, its tokenizer and its chat template, held against the model it came from.

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
"""What of the folder is the model; for native and browser a folder."""
CHECKED = 48
"""Tokens that are read to see that the export gives what the model does."""
FAR, FAR_OF_INTEGERS = 1e-3, 0.1
"""The largest difference of logits, of the logits' own size, that is no mistake. Where weights are integers, other
runtimes round what they are multiplied with to 8 bits too."""

Read = Callable[[Sequence[int]], np.ndarray]
"""Logits after more ids of one sequence."""


class Exported(NamedTuple):
    """What was written."""

    file: Path
    nbytes: int
    off: float | None
    """The largest difference of logits from the model's, over the size of these; None where no compiler is for that
    of C."""


def export(
    source: str, to: str, out: Path, *, weights: str = "stored", standard: bool = False, tokenizer: str | None = None
) -> Exported:
    """The model of a run or folder for another runtime, in a new folder: whole, or nothing of it.

    Args:
        to: one of FILES.
        weights: "stored", "int8" or "int4".
        standard: of ONNX its standard operators only (see `export_onnx`).
        tokenizer: for models that come without one.

    Raises:
        FileExistsError: there is something at `out`.
        OSError: no room on the disk.
        ValueError: a model that cannot be exported, or whose export gives other logits; `standard` beside others.
        ImportError: without the extra of that runtime.
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
                    browser.write_page(folder, own, name=given.path.resolve().name)
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
    """Raises OSError where the disk has less room than the weights will take at least, before anything is written."""
    how = quantization_of(model)
    bits = BITS.get(weights, how.bits if how else 16)
    least = sum(p.numel() for p in model.parameters()) * bits // 8
    place = next(folder for folder in out.absolute().parents if folder.is_dir())
    if (free := shutil.disk_usage(place).free) < least:
        have = f"{free / 1e6:,.0f} MB are free at {place}, the export takes {least / 1e6:,.0f} MB at least"
        raise OSError(f"{have}; choose another folder" + ("" if how else ", or fewer bits (`weights`)"))


def to_onnx(model: LanguageModel, path: Path, eos: int, weights: str, standard: bool) -> float:
    """Writes the graph; how far its logits are from those of the model, with integers if there are some."""
    from retentive.export.onnx_run import OnnxModel

    onnx.check_exportable(model)
    if weights != "stored":
        model = quantize(model, BITS[weights])
    model = model.float().eval()
    onnx.export_onnx(model, path, eos=eos, standard=standard)
    exact = quantization_of(model) is None
    return difference(reading(model), OnnxModel(path).read, model.config.vocab_size, exact=exact)


def to_c(model: LanguageModel, folder: Path, tokenizer: Tokenizer, template: str | None, weights: str) -> float | None:
    """Writes the model as C reads it; how far the logits of that folder are from the model's, read by that C."""
    native.check_exportable(model)
    if weights != "stored":
        model = quantize(model, BITS[weights], dtype=model.dtype)  # few CPUs of phones compute in bfloat16
    save_model(folder, model, tokenizer, template=template)
    exact = model.dtype == torch.float32 and quantization_of(model) is None
    with native.opened(folder) as library:
        if library is None:
            return None
        native.check_words(library, tokenizer)
        return difference(reading(model.float().eval()), library.read, model.config.vocab_size, exact=exact)


def reading(model: LanguageModel) -> Read:
    """A model's own logits."""
    state: Any = None

    @torch.no_grad()
    def read(ids: Sequence[int]) -> np.ndarray:
        nonlocal state
        logits, state = model(torch.tensor([ids]), state)
        return logits[0, -1].numpy()

    return read


def difference(wanted: Read, got: Read, vocab_size: int, *, exact: bool) -> float:
    """The largest difference of logits over the size of these, after a prompt and token by token.

    Raises:
        ValueError: it is too large: another version of the runtime, perhaps.
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
