"""ModelFolder: a folder with config.json, model.safetensors and tokenizer.json, or a GGUF file, as a value.

    folder = ModelFolder.open("runs/mine")      reads config.json once, here and nowhere else
    folder.config, folder.tokenizer, folder.template(tokenizer)
    folder = folder.windowed(256, sinks=4)              a value with another config: its model has constant memory
    model = folder.model(dtype="bfloat16", adapter="runs/change")

Layouts: our own (for transformers too), torchscale's, syncdoth's, fla's, Llama's, HypeNet's and MiniCPM-SALA's. Weights
are read from safetensors and GGUF files only.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from retentive.checkpoint import fla, hf, lightning, llama, rwkv, syncdoth, torchscale
from retentive.checkpoint.adapter import merged
from retentive.checkpoint.find import REMOTE, find, shipped
from retentive.checkpoint.gguf import BLOCK, Gguf
from retentive.checkpoint.quantize import BITS, Quantization, as_quantized, float_tensors, quantize
from retentive.checkpoint.weights import Unfilled, fill, read_tensors, weights_sha256
from retentive.data.templates import BUILT_IN, ChatTemplate, load_template, template_of
from retentive.data.tokenizer import Tokenizer, check_tokens, load_tokenizer
from retentive.files import file_sha256
from retentive.layers.lora import Adapter
from retentive.machine import pick_device
from retentive.models import Config, LanguageModel, ModelConfig, PeerConfig, build
from retentive.models.encoders import CONFIGS, with_encoders
from retentive.models.encoders import Config as EncoderConfig
from retentive.models.version_1 import read_version_1
from retentive.options import option
from retentive.sampling import SAMPLED, SamplingParams

log = logging.getLogger(__name__)
FORMAT = "retentive-model-2"
VERSION_1 = "retentive-model-1"
"""Format of config.json in version 0.1.0."""
UNTRAINED = ".untrained"
"""File in a run's folder whose weights are still the initial ones."""
FOREIGN = {
    "syncdoth": syncdoth,  # before torchscale, whose fields it has
    "torchscale": torchscale,
    "fla": fla,
    "llama": llama,
    "lightning": lightning,
    "rwkv": rwkv,
    "hf": hf,
}
"""Layouts of other projects."""
GENERATION = "generation_config.json"
"""File with the sampling that a model's makers recommend."""
DTYPES = ("float32", "bfloat16", "float16", "float64")
"""Dtypes of weights, by torch's names."""
Weights = Literal["stored", "int8", "int4"]


@dataclass(frozen=True)
class ModelFolder:
    """A model folder whose config.json has been read; weights, tokenizer and template are read on demand."""

    path: Path
    """Local folder; that which holds the file for a GGUF file."""
    name: str
    """Path, name or hub address that it was opened by."""
    layout: str
    """Layout of its files: "retentive" or one of FOREIGN."""
    config: Config
    """Config of the model; for an adapter that of the model it changes."""
    encoders: Mapping[str, EncoderConfig] = field(default_factory=dict)
    """Encoders of pictures and sound by kind; empty for a model that only reads text."""
    adapter: Adapter | None = None
    """Adapter that the folder holds instead of a whole model; None for a whole model."""
    quantization: Quantization | None = None
    """Quantisation of the matrices; None if they are floats."""
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Content of config.json, for layouts whose weights depend on it."""
    gguf: Gguf | None = None
    """GGUF file that holds everything, in place of the folder's files; None for a folder."""
    limits: tuple[int | Sequence[int] | None, int | None] = (None, None)
    """Window and sinks given to `windowed`, for the model that the adapter changes."""

    @staticmethod
    def open(path: "str | Path | ModelFolder") -> "ModelFolder":
        """Opens a local folder or .gguf file, a model that comes with the package, `hf:owner/name` or `pypi:name`.

        Returns a ModelFolder as is.

        Raises:
            TypeError: `path` has a wrong type.
            FileNotFoundError: the folder does not exist, or has no config.json.
            ValueError: the config is damaged, or describes an unknown or unsupported model.
            ImportError: a GGUF file without the extra `gguf`.
            OSError: there is no room for a download.
        """
        if isinstance(path, ModelFolder):
            return path
        folder = find(path)
        if folder.is_file():
            file = Gguf.open(folder)
            raw = file.config()
            config, layout = _config_of(raw, file.path)
            return ModelFolder(folder.parent, str(path), layout, config, raw=raw, gguf=file)
        raw = _read_config(folder)
        config, layout = _config_of(raw, folder / "config.json")
        return ModelFolder(
            folder, str(path), layout, config, _encoders_of(raw, folder), _adapter_of(raw, folder),
            _quantization_of(raw, folder), raw,
        )  # fmt: skip

    @property
    def short_name(self) -> str:
        """Name of the folder or file without its place; as given for models that were not named by a path."""
        if not Path(self.name).exists():
            return self.name
        return self.gguf.path.stem if self.gguf else self.path.resolve().name

    def windowed(self, window: int | Sequence[int] | None, sinks: int | None = None) -> "ModelFolder":
        """Returns the folder with a window in the model's attention, for all that loads it; arguments and errors as
        `ModelConfig.with_window`."""
        config = self.config.with_window(window, sinks)
        limits = window, self.limits[1] if sinks is None else sinks
        return self if config is self.config else replace(self, config=config, limits=limits)

    # text

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Tokenizer of the folder, or of the model its adapter changes; None without one."""
        if self.gguf:
            return self.gguf.tokenizer
        if (self.path / "tokenizer.json").is_file():
            return load_tokenizer(self.path)
        return None if self.adapter is None else self.base.tokenizer

    def tokenizer_for_text(self, given: str | Tokenizer | None = None) -> Tokenizer:
        """Returns the given tokenizer (an object, "bytes", or a file), or else the folder's own.

        Raises:
            ValueError: there is neither, or it has more tokens than the model.
        """
        found = load_tokenizer(given) if isinstance(given, str) else given or self.tokenizer
        if found is None:
            raise ValueError(f"{self.name} has no tokenizer.json: name one as `tokenizer` (bytes, or a file)")
        check_tokens(found, self.config.vocab_size)
        return found

    @property
    def template_source(self) -> str | None:
        """Source of the chat template that came with the model; None without one."""
        return template_of(self._words)

    def template(self, tokenizer: Tokenizer, file: Path | None = None, *, default: str = BUILT_IN) -> ChatTemplate:
        """Loads the chat template in `file`, or the model's own, or the default; raises as `load_template`."""
        return load_template(self._words, tokenizer, file, default=default)

    @cached_property
    def sampling(self) -> SamplingParams | None:
        """Sampling that the model's makers recommend (`generation_config.json`, a file of transformers).

        None without such a file, or if it recommends nothing. Raises ValueError if the file is damaged.
        """
        return sampling_of(self._words)

    @property
    def _words(self) -> Path | Mapping[str, Any]:
        """Model as `load_template` takes it."""
        return self.gguf.tokenizer_config() if self.gguf else self.path

    # weights

    @property
    def untrained(self) -> bool:
        """True if the weights are still the initial ones, of a run before its first checkpoint."""
        return (self.path / UNTRAINED).is_file()

    @cached_property
    def sha256(self) -> str:
        """Hash of all files of weights."""
        return file_sha256(self.gguf.path) if self.gguf else weights_sha256(self.path)

    @property
    def base(self) -> "ModelFolder":
        """Folder of the model that the adapter changes; raises FileNotFoundError if it no longer exists."""
        assert self.adapter is not None
        base = self.adapter.base
        named = base.startswith(REMOTE) or base in shipped()
        if not named and not (Path(base) / "config.json").is_file() and not Path(base).is_file():
            raise FileNotFoundError(
                f"{self.name} is an adapter of the model at {base}, which is not there: give that model, wherever it "
                f"is, with {option('adapter', self.name)}"
            )
        return ModelFolder.open(base).windowed(*self.limits)

    def tensors(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Returns all tensors by their names in the layout's files; raises as `read_tensors` and `Gguf.tensors`.

        Args:
            dtype: dtype in which a GGUF file is decoded, bfloat16 by default (float32 if all its matrices are F32).
        """
        return self.gguf.tensors(dtype) if self.gguf else read_tensors(self.path)

    def model(
        self,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str | None = None,
        weights: Weights = "stored",
        adapter: "str | Path | ModelFolder | None" = None,
    ) -> LanguageModel:
        """Loads the model in eval mode. For an adapter's folder, loads the model it changes with the change merged.

        Args:
            dtype: dtype of the weights, torch's or its name; by default as stored, and for a GGUF file bfloat16
                (float32 if all its matrices are F32), and for a quantised model with an adapter bfloat16.
            weights: "int8" or "int4" quantises while loading, each group of weights separately.
            adapter: folder of an adapter of this model to merge.

        Raises:
            FileNotFoundError: there are no weights.
            ValueError: an unknown dtype, a truncated file, tensors that do not fit the config or are not floating
                point, matrices of several dtypes (if `dtype` is None), or an adapter of another model.
        """
        if weights not in get_args(Weights):
            raise ValueError(f"{option('weights', weights)}: expected one of {', '.join(get_args(Weights))}")
        found, device = _dtype_of(dtype), pick_device(device) if isinstance(device, str) else device
        if self.untrained:
            log.warning("%s has trained nothing yet: its weights are the initial ones; resume the run", self.path)
        if self.adapter is not None and adapter is None:
            return self.base.model(device=device, dtype=found, weights=weights, adapter=self)
        change = None if adapter is None else ModelFolder.open(adapter)
        if weights == "stored":
            return self._model(device, found, change)
        exact = found if self.gguf is None else torch.float32  # blocks of integers keep theirs only from exact floats
        model = self._model(device, exact, change)
        return quantize(model, BITS[weights], self.group, dtype=found or torch.bfloat16)

    @property
    def group(self) -> int | None:
        """Columns that share a scale if the model is quantised: the block of a GGUF file's integers, so that those of
        Q8_0 in int8, and of Q4_0 and Q4_1 in int4, stay as they are; None for the default."""
        return BLOCK if self.gguf else None

    def _model(self, device: torch.device, dtype: torch.dtype | None, adapter: "ModelFolder | None") -> LanguageModel:
        tensors, how = self.tensors(dtype), self.quantization
        if self.layout in FOREIGN:
            own: Any = self.config  # other layouts hold models of ours only
            tensors = FOREIGN[self.layout].read_tensors(tensors, own, self.raw)
        if adapter is not None:
            accepted = self._accepted(adapter)
            if how:  # integers hold no change: it goes into floats, which are rounded once, after it
                tensors = float_tensors(self._model(torch.device("cpu"), torch.float32, None))
                how, dtype = None, dtype or torch.bfloat16
            tensors = merged(tensors, adapter.tensors(), accepted)
        # A peer also has buffers, which no file holds, so it must be real.
        with torch.device("cpu") if self.config.library else Unfilled():
            model = build(self.config)
            if how:
                model = as_quantized(model, how, dtype or torch.bfloat16, minimums=tensors.keys())
            if self.encoders:
                with_encoders(model, self.encoders)
        fill(model, tensors, device=device, dtype=dtype, where=self.name)
        model.origin = (adapter or self)._words
        return model.eval()

    def _accepted(self, change: "ModelFolder") -> Adapter:
        """Returns the adapter in another folder; raises ValueError if it has none, or one of another model."""
        if change.adapter is None:
            raise ValueError(f"{change.name} is a model, not an adapter: load it by itself")
        if self.sha256 != change.adapter.base_sha256:
            base = change.adapter.base
            if base in (self.name, str(self.path.resolve())):
                raise ValueError(
                    f"{change.name}: {base} has changed since this adapter was trained on it; pass the model as it was "
                    "then"
                )
            raise ValueError(f"{change.name}: this adapter was trained on {base}, not on {self.name}; pass {base}")
        return change.adapter


def load(
    path: str | Path | ModelFolder,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    adapter: str | Path | ModelFolder | None = None,
    weights: Weights = "stored",
    window: int | Sequence[int] | None = None,
    sinks: int | None = None,
) -> tuple[LanguageModel, Tokenizer | None]:
    """Returns (model in eval mode, tokenizer or None) of a folder; arguments and errors as `ModelFolder`'s methods."""
    folder = ModelFolder.open(path).windowed(window, sinks)
    change = None if adapter is None else ModelFolder.open(adapter)
    model = folder.model(device=device, dtype=dtype, adapter=change, weights=weights)
    return model, folder.tokenizer


def sampling_of(origin: Path | Mapping[str, Any] | None) -> SamplingParams | None:
    """Returns the sampling that is recommended for a model with this `origin`, as `ModelFolder.sampling`."""
    file = origin / GENERATION if isinstance(origin, Path) else None
    if file is None or not file.is_file():
        return None
    raw = _read_json(file)
    known = {name: raw[name] for name in SAMPLED if raw.get(name) is not None}
    if raw.get("do_sample") is False and known:
        known["temperature"] = 0.0
    try:
        return SamplingParams(**known) if known else None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}; fix the file, or delete it") from None


def _dtype_of(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Returns a dtype by its name; raises ValueError if weights cannot have it."""
    name = str(dtype).removeprefix("torch.")
    if dtype is None or name in DTYPES:
        return None if dtype is None else getattr(torch, name)
    raise ValueError(f"{option('dtype', name)}: expected one of {', '.join(DTYPES)}")


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: expected a run directory or a model folder")
    return _read_json(file)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}): the folder is damaged or not a model") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{file} is not a model's config: expected a JSON object, got {type(raw).__name__}")
    return raw


def _config_of(raw: dict[str, Any], file: Path) -> tuple[Config, str]:
    """Returns (config, layout) of a config.json."""
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
    raise ValueError(
        f"{file} describes {found!r}; expected a RetNet (retentive, torchscale, syncdoth, fla), "
        "HypeNet, MiniCPM-SALA, Llama, Mistral, Qwen2 or Qwen3"
    )


def _adapter_of(raw: dict[str, Any], folder: Path) -> Adapter | None:
    said = raw.get("adapter")
    try:
        return None if said is None else Adapter(**said)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} describes no adapter of this version ({error})") from None


def _encoders_of(raw: dict[str, Any], folder: Path) -> dict[str, EncoderConfig]:
    try:
        return {kind: CONFIGS[kind](**own) for kind, own in (raw.get("encoders") or {}).items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} describes no encoders of this version ({error})") from None


def _quantization_of(raw: dict[str, Any], folder: Path) -> Quantization | None:
    said = raw.get("quantization")
    try:
        return None if said is None else Quantization(**said)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: unknown quantization {said} ({error})") from None
