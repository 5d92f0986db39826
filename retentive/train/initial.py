"""The initial model of a run: new encoders, given weights, an adapter, and checks that they fit the data."""

from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from retentive import machine
from retentive.checkpoint import ModelFolder
from retentive.checkpoint.adapter import targets_of
from retentive.checkpoint.quantize import as_quantized
from retentive.data.mixture import Mixture
from retentive.data.packed import Packed
from retentive.layers.lora import Adapter
from retentive.models import Config, LanguageModel, cost
from retentive.models.encoders import CONFIGS as ENCODERS
from retentive.models.encoders import Config as Encoder
from retentive.models.encoders import config_for, encoders_of
from retentive.options import option


def encoders_for(data: Packed | Mixture, base: ModelFolder | None, changes: Mapping[str, Any]) -> dict[str, Encoder]:
    """Configs of the encoders that a model needs for these data: those of `base` if it has them, else new ones.

    Args:
        changes: the option `set`; names with a dot change an encoder.

    Raises:
        ValueError: an unknown field, a field that the data decide, or data packed differently from those of `base`.
    """
    init = base.name if base else ""
    made: dict[str, Encoder] = dict(base.encoders) if base else {}
    wanted = {name: value for name, value in changes.items() if "." in name}
    for name, value in wanted.items():
        if name.partition(".")[0] not in data.media:
            raise ValueError(f"{option('set', {name: value})}: {data.path} holds nothing of that kind")
    for kind, how in data.media.items():
        typed = {name: value for name, value in wanted.items() if name.startswith(f"{kind}.")}
        changed = {name.partition(".")[2]: value for name, value in typed.items()}
        known = {f.name for f in fields(ENCODERS[kind])}
        if wrong := sorted(set(changed) - (known - set(how))):
            why = "the data decide it" if wrong[0] in how else f"it has {', '.join(sorted(known - set(how)))}"
            raise ValueError(f"{option('set', {f'{kind}.{wrong[0]}': changed[wrong[0]]})}: {why}")
        if kind not in made:
            try:
                made[kind] = config_for(kind, how, **changed)
            except (ValueError, TypeError) as error:  # which names the field alone
                raise type(error)(f"{option('set', typed)}: {error}") from None
        elif changed:
            raise ValueError(f"{option('init', init)} brings its encoder of {kind}: leave out {option('set', typed)}")
        # another token means another tokenizer, which `check_vocabulary` reports better
        elif odd := [k for k, v in how.items() if k in known - {"token"} and getattr(made[kind], k) != v]:
            had, now = getattr(made[kind], odd[0]), how[odd[0]]
            raise ValueError(f"{init} has {kind} {odd[0]} {had}, {data.path} has {now}: pack the data alike")
    return made


def load_initial(model: LanguageModel, base: ModelFolder, data: Packed | Mixture, *, lora: bool) -> LanguageModel:
    """Load the weights of the model folder `base` into `model`; return it, quantised if `base` is.

    Encoders that `base` lacks keep their random initial weights.

    Raises:
        ValueError: the weights do not fit the data, or training an adapter alone (`lora`).
    """
    given = base.model(dtype=torch.float32)  # weights that are trained are float32, as moments
    check_vocabulary(base, data)
    new = set(encoders_of(model)) - set(encoders_of(given))
    if new and lora:
        raise ValueError(
            f"{base.name} has no encoder of {', '.join(sorted(new))}, and `lora` would leave a new one as it was "
            "drawn: train the whole model on such data first"
        )
    return _filled(model, given, base, strict=not new)


def load_base(model: LanguageModel, base: ModelFolder, run: Path) -> LanguageModel:
    """Load the base weights of a run's adapter into `model`; return it, quantised if `base` is.

    Raises:
        ValueError: the weights in `base` are different ones.
    """
    before = ModelFolder.open(run).adapter
    if before is None or before.base_sha256 != base.sha256:
        raise ValueError(f"{base.name} is not the model, or no longer, that the run at {run} changes")
    return _filled(model, base.model(dtype=torch.float32), base, strict=True)


def _filled(model: LanguageModel, given: LanguageModel, base: ModelFolder, *, strict: bool) -> LanguageModel:
    """Fill `model` with the weights of the loaded model `given`; return it, with integers if `given` has some."""
    weights = given.state_dict()
    if how := base.quantization:
        model = as_quantized(model, how, torch.float32, minimums=weights.keys())
    model.load_state_dict(weights, strict=strict)
    return model


def adapter_for(model: LanguageModel, base: ModelFolder, rank: int, alpha: float, targets: str) -> Adapter:
    """The adapter to train on the model in `base`; raises ValueError for targets that the model lacks."""
    place = Path(base.name)  # or a name: of a model that comes with the package, or is downloaded
    name = str(place.resolve()) if place.exists() else base.name
    return Adapter(name, base.sha256, rank, alpha, targets_of(model, targets, rank))


def check_taps(config: Config, length: int) -> None:
    """Raise ValueError if a convolution has more taps than a row has tokens: the first would never be trained."""
    taps = 0 if config.library or config.convolution is None else config.convolution.taps
    if taps > length:
        raise ValueError(
            f"a convolution of {taps} taps is longer than rows of {option('length', length)}: change either"
        )


def check_fits(config: Config, batch: int, length: int, device: torch.device) -> None:
    """Raise ValueError if a step certainly does not fit into free memory. Passing is no guarantee that it fits."""
    least, free = cost.least_training_bytes(config, batch * length), machine.free_memory(device)
    if least > free:
        raise ValueError(
            f"{cost.parameters(config) / 1e6:,.1f} M parameters and {batch:,} x {length:,} tokens a batch take "
            f"{least / 1e9:,.1f} GB at the very least, {free / 1e9:,.1f} GB are free on {device}: choose a smaller "
            f"`size`, `batch` or `length` (`accumulate` makes one step of several batches)"
        )


def freeze_others(model: LanguageModel, names: Collection[str]) -> None:
    """Freeze all weights but those whose names contain one of `names`; raises ValueError for one that none contains."""
    found = [name for name, _ in model.named_parameters()]
    if unknown := [part for part in names if not any(part in name for name in found)]:
        raise ValueError(f"{option('only', unknown[0])}: no weight has this in its name; one is {found[-2]}")
    for name, p in model.named_parameters():
        p.requires_grad_(any(part in name for part in names))


def check_vocabulary(base: ModelFolder, data: Packed | Mixture) -> None:
    """Raise ValueError if the model's vocabulary or tokenizer is not that of the data."""
    init, size = base.name, base.config.vocab_size
    if base.tokenizer and base.tokenizer.sha256 != data.tokenizer.sha256:
        raise ValueError(f"{init} has another tokenizer than {data.path}: pack the text with the tokenizer of {init}")
    if size < data.meta.vocab_size:
        raise ValueError(
            f"{init} knows {size:,} tokens, {data.path} has {data.meta.vocab_size:,}: pack the text with the model's "
            "own tokenizer"
        )
