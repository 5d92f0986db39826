"""Models that benches compare, and the correctness gates before anything is timed.

retnet        the RetNet itself
transformer   its twin: same width, depth and parameters, one key head per query head
grouped       the twin with one key head for every four query heads, or nearly (the number must divide)
hybrid        this package's hybrid of the RetNet's shape
llama         Llama of the transformers library with its static cache, if installed
native-*      the RetNet in C, with weights of bf16, int8 or int4
native-twin-*, native-hybrid-*    the grouped twin in C, and the hybrid
llamacpp-*    the grouped twin by llama.cpp, in its formats F16, Q8_0 and Q4_0, if llama_cpp and gguf are installed

native-* and llamacpp-* run on CPUs only.
"""

from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from retentive.bench.lab import plot
from retentive.bench.lab.options import Say, words
from retentive.checkpoint.quantize import quantize
from retentive.infer.decoder import STATES
from retentive.models import Config, LanguageModel, ModelConfig, build, mixed, peer, twin
from retentive.models.presets import narrow_heads
from retentive.native import NativeModel
from retentive.native.library import library
from retentive.ops import using
from retentive.ops.compiler import NotBuilt
from retentive.options import known, option

NAMES = {
    "retnet": "RetNet",
    "transformer": "Transformer twin",
    "grouped": "Transformer twin, grouped heads",
    "llama": "Llama of transformers",
    "native-bf16": "RetNet in C, bf16",
    "native-int8": "RetNet in C, int8",
    "native-int4": "RetNet in C, int4",
    "native-twin-bf16": "Transformer twin in C, bf16",
    "native-twin-int8": "Transformer twin in C, int8",
    "native-twin-int4": "Transformer twin in C, int4",
    "native-hybrid-bf16": "hybrid in C, bf16",
    "native-hybrid-int8": "hybrid in C, int8",
    "native-hybrid-int4": "hybrid in C, int4",
    "llamacpp-f16": "Transformer twin, llama.cpp F16",
    "llamacpp-q8_0": "Transformer twin, llama.cpp Q8_0",
    "llamacpp-q4_0": "Transformer twin, llama.cpp Q4_0",
    "hybrid": "hybrid",
    "native-w8a8": "RetNet in C, int8, activations int8",
    "native-w4a8": "RetNet in C, int4, activations int8",
}
BITS = {"bf16": None, "int8": 8, "int4": 4, "w8a8": 8, "w4a8": 4}
"""Formats of the weights in C, with their bits if those are integers; of w8a8 and w4a8 activations are int8, too."""
NATIVE = tuple(name for name in NAMES if name.startswith("native-"))
"""Models in C."""
LLAMACPP = {"llamacpp-f16": 16.0, "llamacpp-q8_0": 8.5, "llamacpp-q4_0": 4.5}
"""Formats of llama.cpp, with their bits per weight: blocks of 32 with a 16-bit scale."""
IN_C = {*NATIVE, *LLAMACPP}
"""Models that PyTorch does not run."""
NARROW = tuple(name for name in NATIVE if "twin" not in name)
"""Models whose states of retention may have fewer bits."""
TOLERANCE = 1e-4
"""Largest difference of logits between two ways of computing them in float32: rounding of sums over a whole sequence
stays well below."""
LOOKS = dict(zip(NAMES, plot.LOOKS, strict=True))
"""Colour and marker of each model, the same in all pictures."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def label(name: str, result: Mapping[str, Any]) -> str:
    """Returns a model's name in tables and pictures, with the precision of its states if that is not float32."""
    narrow = result.get("state_precision", "fp32")  # older results have none
    return NAMES[name] + (f", states {narrow}" if name in NARROW and narrow != "fp32" else "")


def shown(names: Sequence[str], last: Mapping[str, Mapping[str, Any]], result: Mapping[str, Any]) -> dict[str, str]:
    """Returns names and labels of the models in a picture, as chosen by `plot.at_most`."""
    return {name: label(name, result) for name in plot.at_most(names, last)}


def grouped(config: ModelConfig) -> ModelConfig:
    """Returns the twin of a RetNet with one key head for every four query heads, or nearly."""
    heads = config.all_retention("a bench").heads
    return twin(config, kv_heads=next(n for n in range(-(-heads // 4), 0, -1) if heads % n == 0))


def config_of(name: str, config: ModelConfig, *, full_heads: bool = False) -> Config:
    """Returns the config of the model `name` that matches this RetNet: itself, a twin, a hybrid or a Llama of its size.

    Args:
        full_heads: give the twin in C and in llama.cpp a key head for every query head.
    """
    if name == "llama":
        return peer(config, "llama")
    if name == "grouped" or name in LLAMACPP or name.startswith("native-twin"):
        return twin(config) if full_heads and name != "grouped" else grouped(config)
    if name == "hybrid" or name.startswith("native-hybrid"):
        return mixed(narrow_heads(config))
    return twin(config) if name == "transformer" else config


def missing(name: str, device: torch.device) -> str | None:
    """Returns the reason why the model cannot run here; None if it can."""
    packages = ["transformers"] if name == "llama" else ["llama_cpp", "gguf"] if name in LLAMACPP else []
    if absent := [package for package in packages if not find_spec(package)]:
        return f"{absent[0]} is not installed"
    if name in (*NATIVE, *LLAMACPP) and device.type != "cpu":
        return "it runs on the CPU"
    return str(library()) if name in NATIVE and isinstance(library(), NotBuilt) else None


def chosen(names: Sequence[str], among: Collection[str], device: torch.device, say: Say) -> list[str]:
    """Returns the names in the order of NAMES; reports and leaves out models that this machine cannot run.

    Args:
        names: value of an option `models`.
        among: names that the bench knows.

    Raises:
        ValueError: a name is unknown, or retnet, the base of all comparisons, is missing.
    """
    names = words(names)
    known(names, among, "model")
    if "retnet" not in names:
        raise ValueError(f"{option('models', tuple(names))}: retnet is missing, with which all others are compared")
    reasons = {name: missing(name, device) for name in NAMES if name in names}
    for name, reason in reasons.items():
        if reason:
            say(f"without {name}: {reason}")
    return [name for name, reason in reasons.items() if not reason]


def check_states(precision: str, names: Sequence[str]) -> None:
    """Raises ValueError if the precision of states is unknown, or narrow and of none of these models."""
    known([precision], STATES, "`state_precision`")
    if STATES[precision] and not {*words(names)} & {*NARROW}:
        said = option("state_precision", precision)
        raise ValueError(f"{said}: only models in C have such states, add one of {', '.join(NARROW)}")


def make(name: str, config: Any, device: torch.device, dtype: torch.dtype = torch.float32):
    """Returns the model with random weights, the same at every call, ready for inference.

    Args:
        config: config of the model `name` itself, as by `config_of`.
    """
    # so that repetitions, and the process that measures memory, have the same model
    torch.manual_seed(0)
    model = build(config)
    if name not in NATIVE:
        return model.to(device, dtype).eval()
    form = name.rpartition("-")[2]
    model, bits = model.bfloat16().eval(), BITS[form]
    activations = "int8" if form.endswith("a8") else "int16"
    return NativeModel(model if bits is None else quantize(model, bits), activations=activations)


@torch.inference_mode()
def check_forms(model: LanguageModel, length: int) -> float:
    """Returns the largest difference of float32 logits between the parallel and the other forms.

    Raises:
        ArithmeticError: the difference is above the tolerance.
    """
    ids = _ids(model, length)
    logits = {}
    # all three, since length and state decide the form, and any may run while timed
    for form in ("parallel", "chunkwise", "recurrent"):
        with using(form=form):
            logits[form] = model(ids)[0]
    # compared with `parallel`, which carries no state and joins no chunks
    worst = max(float((x - logits["parallel"]).abs().max()) for x in logits.values())
    # `not <=` instead of `>`, so that a NaN fails
    if not worst <= TOLERANCE:
        raise ArithmeticError(f"RetNet's forms differ by {worst:.1e} at length {length}, above {TOLERANCE}: not timed")
    return worst


@torch.inference_mode()
def check_decoding(model: LanguageModel, length: int = 48, *, state_dtype: torch.dtype | None = None) -> float:
    """Returns the largest difference of logits between reading a text at once and token by token, in the model's dtype.

    Args:
        length: tokens of the text, by default enough to fold the ring of any head several times.
        state_dtype: dtype of the states of retention while decoding; None: float32.

    Raises:
        ArithmeticError: the difference is above the tolerance: TOLERANCE in float32, else 16 roundings of the narrowest
            dtype, relative to the largest logit. Above 12 blocks, in proportion more.
    """
    ids = _ids(model, length)
    want = model(ids)[0]
    state: Any = model.init_state(1).reserve(length).for_decoding(model.dtype, state_dtype=state_dtype)
    parts = []
    for t in range(length):
        logits, state = model(ids[:, t : t + 1], state)
        parts.append(logits)
    worst = float((torch.cat(parts, 1) - want).abs().max())
    # One rounding to bf16 changes a number by 2^-8 of it at most; one to 127 steps, by as much of its group's largest
    # number, which is four times as large as most.
    if state_dtype == torch.int8 or getattr(model, "activations", "") == "int8":
        step = 2**-6
    else:
        step = 2**-8 if torch.bfloat16 in (state_dtype, model.dtype) else 0
    # Each block rounds anew. The 24 of fla-340m differ by 22 roundings, and either way of reading by as many from
    # float32.
    roundings = 16 * max(1.0, len(model.config.without_convolutions().blocks) / 12)
    bound = roundings * step * max(1.0, float(want.abs().max())) if step else TOLERANCE
    if not worst <= bound:
        raise ArithmeticError(
            f"{model.config.name} decodes logits that are off by {worst:.1e}, more than {bound:.1e}: not timed"
        )
    return worst


def _ids(model: LanguageModel, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=generator)
    return ids.to(model.device)
