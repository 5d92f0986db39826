"""Model folders: config.json, model.safetensors, tokenizer.json. `load` reads ours, torchscale's and fla's.

Weights are only ever read from safetensors. What is written appears whole or not at all.
"""

import json
import logging
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from retentive.checkpoint import fla, torchscale
from retentive.checkpoint.adapter import adapter_of, merged, weights_sha256
from retentive.checkpoint.quantize import Quantization, as_quantized, quantization_of
from retentive.data.templates import TEMPLATE
from retentive.data.tokenizer import Tokenizer, check_tokens, load_tokenizer
from retentive.files import load_tensors, save_tensors, write_text, write_together
from retentive.layers.lora import Adapter
from retentive.machine import pick_device
from retentive.models import (
    Config,
    LanguageModel,
    ModelConfig,
    PeerConfig,
    build,
)
from retentive.models.encoders import CONFIGS, configs_of, with_encoders
from retentive.models.encoders import Config as EncoderConfig
from retentive.models.version_1 import read_version_1

log = logging.getLogger(__name__)
FORMAT = "retentive-model-2"
VERSION_1 = "retentive-model-1"
"""Format of config.json in version 0.1.0."""
UNTRAINED = ".untrained"
"""The file of a run's folder that says that nothing has been trained yet: its weights are the initial ones."""
SHIPPED = Path(__file__).parents[1] / "shipped"
"""Where models lie that come with the package, each with its card, README.md."""
FOREIGN = {"torchscale": torchscale, "fla": fla}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def load(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    adapter: str | Path | None = None,
) -> tuple[LanguageModel, Tokenizer | None]:
    """(model in eval mode, tokenizer or None), from a folder in our layout, torchscale's or fla's, or from the hub.

    The folder of an adapter is that of the model which it changes, with the change merged into it. Of a run that has
    not come to its first checkpoint the initial weights are loaded, with a warning in the log.

    Args:
        path: a run directory or model folder; or `hf:owner/name`, a Hugging Face repository, which is downloaded.
        dtype: of the weights; as stored if not given.
        adapter: the folder of an adapter of this model, to be merged into it.

    Raises:
        TypeError: a path or a dtype of the wrong type.
        FileNotFoundError: no such folder, or it holds no model.
        ValueError: an unknown layout, a truncated file, tensors that do not fit the config or are not floating point,
            or matrices of several dtypes (where none is asked for).
    """
    if not isinstance(path, str | Path):
        raise TypeError(f"path must name a model folder, got {type(path).__name__}")
    if not isinstance(dtype, torch.dtype | None):
        raise TypeError(f"dtype must be one of torch's, such as torch.bfloat16, got {dtype!r}")
    folder = find(path)
    if (folder / UNTRAINED).is_file():
        log.warning("%s has trained nothing yet: its weights are the initial ones (--resume goes on with it)", folder)
    device = pick_device(device) if isinstance(device, str) else device
    if adapter is None and (change := load_adapter(folder)):
        model, tokenizer = load(_base_of(change, folder), device=device, dtype=dtype, adapter=folder)
        return model, load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else tokenizer
    config, layout = load_config(folder)
    how = load_quantization(folder)
    tensors = read_tensors(folder)
    if layout in FOREIGN:
        tensors = FOREIGN[layout].read_tensors(tensors, config)
    if adapter is not None:
        tensors = _changed(tensors, folder, find(adapter))
    # On "meta" nothing is allocated or initialised. A peer has buffers too, which no file holds: it must be real.
    with torch.device("cpu") if config.library else Unfilled():
        model = build(config)
        if how:
            model = as_quantized(model, how, dtype or torch.bfloat16)
        if encoders := load_encoders(folder):
            with_encoders(model, encoders)
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    _check_fit(tensors, parameters, folder)
    kept = {name: x.dtype for name, x in parameters.items() if how and not x.requires_grad}  # integers and their scales
    _check_dtypes(tensors, kept, dtype, folder)
    # assign: the tensors become the parameters, since those on "meta" have no memory to copy into. Not strict: of tied
    # matrices the file has one, and all else has been checked.
    ready = {name: x.to(device, kept.get(name, dtype)) for name, x in tensors.items()}
    model.load_state_dict(ready, strict=False, assign=True)
    if config.tie_embeddings:  # `assign` has untied them
        if how:
            model.head.scale = model.embed.scale
        model.head.weight = model.embed.weight
    tokenizer = load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None
    return model.eval(), tokenizer


class Unfilled(TorchFunctionMode):
    """New tensors are on "meta" and never filled: torch would import its compiler for that, which takes 0.8 s."""

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


def load_with_tokenizer(
    path: str | Path,
    tokenizer: str | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    adapter: str | Path | None = None,
) -> tuple[LanguageModel, Tokenizer]:
    """(model, tokenizer), for whatever reads or writes text.

    Args:
        tokenizer: "bytes" or a file, in place of the model's own.

    Raises:
        FileNotFoundError, ValueError: as `load`; or there is no tokenizer, or its size is not that of the model's.
    """
    model, found = load(path, device=device, dtype=dtype, adapter=adapter)
    if tokenizer:
        found = load_tokenizer(tokenizer)
    if found is None:
        raise ValueError(f"{path} has no tokenizer.json: name one with --tokenizer (bytes, or a file)")
    check_tokens(found, model.config.vocab_size)
    return model, found


def find(path: str | Path) -> Path:
    """The local folder of a model; that of `hf:owner/name` is downloaded from the Hugging Face hub.

    Where there is no such folder, it may be the name of a model that comes with the package (SHIPPED). Without `hf:`
    nothing is downloaded: a typing error in a path would fetch a stranger's model.

    Raises:
        FileNotFoundError: no such folder, or the hub has no such model.
        ValueError: a file instead of a folder.
    """
    name, folder = str(path), Path(path)
    if name.startswith("hf:"):
        return _download(name.removeprefix("hf:"))
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{path} is a file; expected a model folder with config.json and model.safetensors")
    if name in shipped():
        return SHIPPED / name
    hint = f"; for the Hugging Face repository write hf:{path}" if name.count("/") == 1 and name[0] not in "./" else ""
    if not hint and "/" not in name:
        hint = f"; by its name alone there is {', '.join(shipped())}, which comes with the package"
    raise FileNotFoundError(f"no model folder at {path}{hint}")


def shipped() -> list[str]:
    """The models that come with the package."""
    return sorted(file.parent.name for file in SHIPPED.glob("*/config.json"))


def _download(name: str) -> Path:
    """The folder of a repository in the hub's own cache. Weights are fetched as safetensors only."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(f"the Hugging Face hub does not give {name!r}: {reason}") from None


def load_config(folder: Path) -> tuple[Config, str]:
    """(config, layout) of a model folder; the layout is "retentive", "torchscale" or "fla".

    Raises:
        FileNotFoundError: no config.json.
        ValueError: it is damaged, or describes a model that is not known or not supported.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: expected a run directory or a model folder")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}): the folder is damaged or not a model") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{file} is not a model's config: expected a JSON object, got {type(raw).__name__}")
    try:
        if raw.get("format") in (FORMAT, VERSION_1):
            kind, config = raw.get("kind"), raw["config"]
            if not isinstance(config, dict):
                raise TypeError('expected "config" to be its fields')
            if kind == "peer":
                return PeerConfig(**config), "retentive"
            return read_version_1(kind, config) if raw["format"] == VERSION_1 else ModelConfig.read(config), "retentive"
        for name, layout in FOREIGN.items():
            if layout.recognises(raw):
                return layout.read_config(raw), name
    except KeyError as error:
        raise ValueError(f"{file} does not describe a model of this version: it has no {error}") from None
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{file} does not describe a model of this version: {error}") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    found = raw.get("model_type") or raw.get("architectures") or raw.get("format") or "nothing known"
    raise ValueError(f"{file} describes {found!r}; expected a retentive, torchscale RetNet or fla RetNet model")


def load_adapter(folder: Path) -> Adapter | None:
    """What a model folder holds of an adapter; None if it holds a whole model. Its config is read afterwards.

    Raises:
        ValueError: it is damaged.
    """
    load_config(folder)
    said = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("adapter")
    try:
        return None if said is None else Adapter(**said)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} describes no adapter of this version ({error})") from None


def load_encoders(folder: Path) -> dict[str, EncoderConfig]:
    """What a model sees and hears by; nothing for one that only reads. Its folder's config has been read before.

    Raises:
        ValueError: an encoder that is not known.
    """
    said = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("encoders") or {}
    try:
        return {kind: CONFIGS[kind](**fields) for kind, fields in said.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} describes no encoders of this version ({error})") from None


def _base_of(adapter: Adapter, folder: Path) -> str:
    """The model that the adapter in `folder` changes; raises FileNotFoundError where it is no longer there."""
    if not adapter.base.startswith("hf:") and not (Path(adapter.base) / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} is an adapter of the model at {adapter.base}, which is not there: give that model, wherever it "
            f"is, and --adapter {folder}"
        )
    return adapter.base


def _changed(tensors: dict[str, Tensor], base: Path, folder: Path) -> dict[str, Tensor]:
    """The weights of the model in `base`, with the adapter in `folder` merged into them."""
    adapter = load_adapter(folder)
    if adapter is None:
        raise ValueError(f"{folder} is a model and no adapter: load it by itself")
    if load_quantization(base):
        raise ValueError(
            f"{base} is quantised, and takes no adapter: merge it first (retentive convert), then quantise"
        )
    if weights_sha256(base) != adapter.base_sha256:
        raise ValueError(
            f"{folder} is an adapter of another model than {base}: of {adapter.base} as it was then; give that one"
        )
    return merged(tensors, read_tensors(folder), adapter)


def load_quantization(folder: Path) -> Quantization | None:
    """How the matrices of a model folder are quantised; None if they are floats. Its config has been read before.

    Raises:
        ValueError: a way that is not known.
    """
    said = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization")
    try:
        return None if said is None else Quantization(**said)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: unknown quantization {said} ({error})") from None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the shards that model.safetensors.index.json lists, by their names there.

    Raises:
        FileNotFoundError: no such file.
        ValueError: one that is damaged.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{index} lists no shards: the folder is damaged, copy it again") from None
        files = [folder / Path(name).name for name in sorted(set(shards))]  # name: an index cannot point elsewhere
    else:
        files = [folder / "model.safetensors"]
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            other = [p.name for p in folder.glob("*.bin")] + [p.name for p in folder.glob("*.pt")]
            hint = f" (it has {other[0]}, but pickled weights are never loaded: convert them)" if other else ""
            raise FileNotFoundError(f"{folder} holds no {file.name}{hint}")
        found, about = load_tensors(file)
        if "crc32" in about and about["crc32"] != _checksum(found):
            raise ValueError(f"{file} is damaged: its bytes are not those that were written, copy or make it again")
        tensors |= found
    return tensors


def _checksum(tensors: dict[str, Tensor]) -> str:
    """CRC-32 of all bytes, in the order of names."""
    crc = 0
    for _, x in sorted(tensors.items()):
        crc = zlib.crc32(x.flatten().view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def _check_fit(tensors: dict[str, Tensor], parameters: dict[str, Tensor], folder: Path) -> None:
    """Raises ValueError unless the tensors are those of the model, by names and shapes."""
    missing = sorted(set(parameters) - set(tensors))
    extra = sorted(set(tensors) - set(parameters))
    wrong = [n for n in parameters if n in tensors and parameters[n].shape != tensors[n].shape]
    if missing or extra:
        raise ValueError(
            f"weights in {folder} do not fit its config: {len(missing)} tensors missing {missing[:2]}, "
            f"{len(extra)} unexpected {extra[:2]}"
        )
    if wrong:
        n = wrong[0]
        got, expected = list(tensors[n].shape), list(parameters[n].shape)
        raise ValueError(f"weights in {folder} do not fit its config: {n} is {got}, expected {expected}")


def _check_dtypes(
    tensors: dict[str, Tensor], kept: dict[str, torch.dtype], asked: torch.dtype | None, folder: Path
) -> None:
    """Raises ValueError where weights are not floating point, or no single dtype can be chosen for the model; or where
    those that keep theirs have another."""
    for name, dtype in kept.items():
        if tensors[name].dtype != dtype:
            raise ValueError(f"weights in {folder}: {name} is {tensors[name].dtype}, expected {dtype}")
    tensors = {name: x for name, x in tensors.items() if name not in kept}
    odd = next((name for name, x in tensors.items() if x.dtype not in DTYPES), None)
    if odd:
        raise ValueError(
            f"weights in {folder}: {odd} is {tensors[odd].dtype}, expected floating numbers of 16 to 64 bits"
        )
    # Gains of norms may be wider than the matrices, as in mixed precision.
    matrices = {x.dtype: name for name, x in tensors.items() if x.ndim > 1}
    if asked is None and len(matrices) > 1:
        found = ", ".join(f"{name} is {dtype}" for dtype, name in matrices.items())
        raise ValueError(f"weights in {folder} are of several dtypes ({found}): name one, with dtype= or --dtype")


def save_model(
    folder: str | Path,
    model: LanguageModel,
    tokenizer: Tokenizer | None = None,
    *,
    template: str | None = None,
    layout: str = "retentive",
) -> None:
    """Writes a model folder; files of the same names in it are replaced.

    Args:
        template: the source of the model's chat template, if it has one.
        layout: "retentive", "torchscale" or "fla".

    Raises:
        ValueError: an architecture that the other project cannot express (all fields that differ are named).
        OSError: the folder cannot be written; what was there remains.
    """
    folder, config = Path(folder), model.config
    tensors = {name: x.detach().cpu().contiguous() for name, x in saved(model)}
    if layout == "retentive":
        raw = _described(model)
    else:
        if quantization_of(model):
            raise ValueError(f"{layout} has no quantised models: write the one that this was made from")
        if configs_of(model):
            raise ValueError(f"{layout} has no models with encoders of pictures or sound")
        if config.library:
            raise ValueError(f"{layout} has RetNets only, this is a model of {config.library}")
        raw = FOREIGN[layout].write_config(config)
        tensors = FOREIGN[layout].write_tensors(tensors, config)
    folder.mkdir(parents=True, exist_ok=True)
    described = json.dumps(raw, indent=2) + "\n"
    # any byte is a pair of weights of 4 bits: a flipped one would not show
    about = {"crc32": _checksum(tensors)} if quantization_of(model) else {}
    write_together(
        {
            folder / "model.safetensors": lambda partial: save_tensors(partial, tensors, about),
            folder / "config.json": lambda partial: partial.write_text(described, encoding="utf-8"),
        }
    )
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)  # of older weights, which `load` would prefer
    _save_words(folder, tokenizer, template)


def save_all_but_weights(
    folder: Path, model: LanguageModel, tokenizer: Tokenizer | None = None, *, template: str | None = None
) -> None:
    """The files of `save_model` beside model.safetensors, for who writes that by parts."""
    write_text(folder / "config.json", json.dumps(_described(model), indent=2) + "\n")
    _save_words(folder, tokenizer, template)


def saved(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that are saved, by name: all, or those of an adapter, which leaves the others as they are."""
    adapter = adapter_of(model)
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad or not adapter]


def _described(model: LanguageModel) -> dict[str, Any]:
    """What config.json says of it."""
    raw: dict[str, Any] = {"format": FORMAT, "config": model.config.written()}
    if model.config.library:
        raw["kind"] = "peer"
    if how := quantization_of(model):
        raw["quantization"] = asdict(how)
    if adapter := adapter_of(model):
        raw["adapter"] = asdict(adapter)
    if encoders := configs_of(model):
        raw["encoders"] = encoders
    return raw


def _save_words(folder: Path, tokenizer: Tokenizer | None, template: str | None) -> None:
    if tokenizer is not None:
        tokenizer.save(folder)
    if template is not None:
        write_text(folder / TEMPLATE, template)
