"""Weights between files and models: safetensors with a checksum, and assignment to a model's parameters."""

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from retentive.files import file_sha256, load_tensors
from retentive.models import LanguageModel

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Unfilled(TorchFunctionMode):
    """Creates tensors on "meta" without filling them, for which torch would import its compiler, 0.8 s."""

    FILLING = ("normal_", "uniform_", "constant_", "kaiming_uniform_", "fill_", "zero_", "copy_")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in self.FILLING:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs or {})

    def __enter__(self):
        self._device = torch.device("meta")
        self._device.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._device.__exit__(*error)


def files_of(folder: Path) -> list[Path]:
    """Returns the files of weights of a folder: model.safetensors, or the shards in model.safetensors.index.json.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the index is damaged.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{index} lists no shards: the folder is damaged, copy it again") from None
        files = [folder / Path(name).name for name in sorted(set(shards))]  # no paths: an index cannot point elsewhere
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            other = [p.name for p in folder.glob("*.bin")] + [p.name for p in folder.glob("*.pt")]
            hint = f" (it has {other[0]}, but pickled weights are never loaded: convert them)" if other else ""
            raise FileNotFoundError(f"{folder} holds no {file.name}{hint}")
    return files


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Reads all tensors of a folder by their names there.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged.
    """
    tensors: dict[str, Tensor] = {}
    for file in files_of(folder):
        found, about = load_tensors(file)
        if "crc32" in about and about["crc32"] != checksum(found):
            raise ValueError(f"{file} is damaged: its bytes are not those that were written, copy or make it again")
        tensors |= found
    return tensors


def checksum(tensors: dict[str, Tensor]) -> str:
    """Returns the CRC-32 of all bytes in order of names, 8 hex digits: "crc32" in the metadata of a file of weights."""
    crc = 0
    for _, x in sorted(tensors.items()):
        crc = zlib.crc32(x.flatten().view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def weights_sha256(folder: Path) -> str:
    """Returns the hash of all weight files of a model folder."""
    return file_sha256(*sorted(folder.glob("model*.safetensors")))


def fill(
    model: LanguageModel, tensors: dict[str, Tensor], *, device: torch.device, dtype: torch.dtype | None, where: str
) -> None:
    """Assigns tensors to a model's parameters, in `dtype` (as they are if None); integers stay integers.

    Args:
        where: their origin, for messages.

    Raises:
        ValueError: tensors do not fit by name, shape or dtype.
    """
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    check_fit(tensors, parameters, where)
    kept = {name: x.dtype for name, x in parameters.items() if not x.dtype.is_floating_point or _is_scale(model, name)}
    _check_dtypes(tensors, kept, dtype, where)
    # assign: the tensors become the parameters, since those on "meta" have no memory to copy into. Not strict: the file
    # has only one of tied matrices, and everything else has been checked.
    ready = {name: x.to(device, kept.get(name, dtype)) for name, x in tensors.items()}
    model.load_state_dict(ready, strict=False, assign=True)
    if model.config.tie_embeddings:  # `assign` has untied them
        if kept:
            model.head.scale, model.head.minimum = model.embed.scale, model.embed.minimum
        model.head.weight = model.embed.weight


def _is_scale(model: Any, name: str) -> bool:
    """True for scales and minimums of a quantised matrix."""
    owner, _, own = name.rpartition(".")
    return own in ("scale", "minimum") and not model.get_submodule(owner).weight.dtype.is_floating_point


def check_fit(tensors: dict[str, Tensor], parameters: dict[str, Tensor], where: str) -> None:
    """Raises ValueError unless the tensors have the model's names and shapes."""
    missing = sorted(set(parameters) - set(tensors))
    extra = sorted(set(tensors) - set(parameters))
    wrong = [n for n in parameters if n in tensors and parameters[n].shape != tensors[n].shape]
    if missing or extra:
        raise ValueError(
            f"weights in {where} do not fit its config: {len(missing)} tensors missing {missing[:2]}, "
            f"{len(extra)} unexpected {extra[:2]}"
        )
    if wrong:
        n = wrong[0]
        got, expected = list(tensors[n].shape), list(parameters[n].shape)
        raise ValueError(f"weights in {where} do not fit its config: {n} is {got}, expected {expected}")


def _check_dtypes(
    tensors: dict[str, Tensor], kept: dict[str, torch.dtype], asked: torch.dtype | None, where: str
) -> None:
    """Raises ValueError if weights are not floating point, if no single dtype can be chosen for the model, or if
    tensors that keep their dtype have a wrong one."""
    for name, dtype in kept.items():
        if tensors[name].dtype != dtype:
            raise ValueError(f"weights in {where}: {name} is {tensors[name].dtype}, expected {dtype}")
    tensors = {name: x for name, x in tensors.items() if name not in kept}
    odd = next((name for name, x in tensors.items() if x.dtype not in DTYPES), None)
    if odd:
        raise ValueError(
            f"weights in {where}: {odd} is {tensors[odd].dtype}, expected floating numbers of 16 to 64 bits"
        )
    # Gains of norms may be wider than the matrices, as in mixed precision.
    matrices = {x.dtype: name for name, x in tensors.items() if x.ndim > 1}
    if asked is None and len(matrices) > 1:
        found = ", ".join(f"{name} is {dtype}" for dtype, name in matrices.items())
        raise ValueError(f"weights in {where} are of several dtypes ({found}): name one (`dtype`)")
