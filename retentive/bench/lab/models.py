"""The whole models that benches put side by side, and the correctness gates before anything is timed.

retnet        the RetNet itself
transformer   its twin: as wide and deep, the same parameters, a head of keys and values for every query head
grouped       the twin with one head of keys and values for every four of queries (or nearly: the number must divide)
llama         Llama of the transformers library with its static cache, where that is installed: another engine
native-*      the RetNet by the model in C, with weights of bf16, int8 or int4
llamacpp-*    the grouped twin by llama.cpp, in its formats F16, Q8_0 and Q4_0, where llama_cpp and gguf are installed

The last two are for CPUs.
"""

from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from retentive.bench.lab import plot
from retentive.bench.lab.options import Say, words
from retentive.checkpoint.quantize import quantize
from retentive.models import Config, LanguageModel, ModelConfig, build, peer, twin
from retentive.native import NativeModel
from retentive.native.library import library
from retentive.ops import using
from retentive.ops.compiler import NotBuilt
from retentive.options import known

NAMES = {
    "retnet": "RetNet",
    "transformer": "Transformer twin",
    "grouped": "Transformer twin, grouped heads",
    "llama": "Llama of transformers",
    "native-bf16": "RetNet in C, bf16",
    "native-int8": "RetNet in C, int8",
    "native-int4": "RetNet in C, int4",
    "llamacpp-f16": "Transformer twin, llama.cpp F16",
    "llamacpp-q8_0": "Transformer twin, llama.cpp Q8_0",
    "llamacpp-q4_0": "Transformer twin, llama.cpp Q4_0",
}
NATIVE = {"native-bf16": None, "native-int8": 8, "native-int4": 4}
"""Models in C, and the bits of their weights where those are integers."""
LLAMACPP = {"llamacpp-f16": 16.0, "llamacpp-q8_0": 8.5, "llamacpp-q4_0": 4.5}
"""llama.cpp's formats, and their bits a weight: blocks of 32 with a scale of 16 bits."""
TOLERANCE = 1e-4
"""Largest difference of logits between two ways of computing them in float32: rounding of sums over a whole sequence
stays well below."""
LOOKS = dict(zip(NAMES, plot.LOOKS, strict=True))
"""Colour and marker of each model, the same in all pictures."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def shown(names: Sequence[str], last: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Names and labels of the models in a picture, as `plot.at_most` chooses them."""
    return {name: NAMES[name] for name in plot.at_most(names, last)}


def grouped(config: ModelConfig) -> ModelConfig:
    """The twin of a RetNet with one head of keys and values for every four of queries, or nearly."""
    heads = config.all_retention("a bench").heads
    return twin(config, kv_heads=next(n for n in range(-(-heads // 4), 0, -1) if heads % n == 0))


def config_of(name: str, config: ModelConfig) -> Config:
    """The config of the model `name` that matches this RetNet: itself, a twin or a Llama of its size."""
    if name == "llama":
        return peer(config, "llama")
    if name == "grouped" or name in LLAMACPP:
        return grouped(config)
    return twin(config) if name == "transformer" else config


def missing(name: str, device: torch.device) -> str | None:
    """Why the model cannot take part here, or None."""
    packages = ["transformers"] if name == "llama" else ["llama_cpp", "gguf"] if name in LLAMACPP else []
    if absent := [package for package in packages if not find_spec(package)]:
        return f"{absent[0]} is not installed"
    if name in (*NATIVE, *LLAMACPP) and device.type != "cpu":
        return "it runs on the CPU"
    return str(library()) if name in NATIVE and isinstance(library(), NotBuilt) else None


def chosen(names: Sequence[str], among: Collection[str], device: torch.device, say: Say) -> list[str]:
    """The names in the order of NAMES, without those that this machine cannot run, which is said.

    Args:
        names: as an option `models` has them.
        among: names that the bench knows.

    Raises:
        ValueError: an unknown name; RetNet, to which all others are compared, not among them.
    """
    names = words(names)
    known(names, among, "model")
    if "retnet" not in names:
        raise ValueError(f"retnet must be among the models, the others are compared with it; got {', '.join(names)}")
    reasons = {name: missing(name, device) for name in NAMES if name in names}
    for name, reason in reasons.items():
        if reason:
            say(f"without {name}: {reason}")
    return [name for name, reason in reasons.items() if not reason]


def make(name: str, config: ModelConfig, device: torch.device, dtype: torch.dtype = torch.float32):
    """The model with random weights, the same at every call, ready for inference."""
    # so that repetitions, and the process that memory is measured in, have the same model
    torch.manual_seed(0)
    if name not in NATIVE:
        return build(config_of(name, config)).to(device, dtype).eval()
    model, bits = build(config).bfloat16().eval(), NATIVE[name]
    made = model if bits is None else quantize(model, bits)
    return NativeModel(made)


@torch.inference_mode()
def check_forms(model: LanguageModel, length: int) -> float:
    """The largest difference of float32 logits between the parallel and the other forms.

    Raises:
        ArithmeticError: it is above the tolerance.
    """
    ids = _ids(model, length)
    logits = {}
    # all three: which one a model takes depends on length and state, so that any may run while it is timed
    for form in ("parallel", "chunkwise", "recurrent"):
        with using(form=form):
            logits[form] = model(ids)[0]
    # held against `parallel`, which has no state to carry and no chunks to join
    worst = max(float((x - logits["parallel"]).abs().max()) for x in logits.values())
    # `not <=` and not `>`: a NaN is worse than any bound
    if not worst <= TOLERANCE:
        raise ArithmeticError(f"RetNet's forms differ by {worst:.1e} at length {length}, above {TOLERANCE}: not timed")
    return worst


@torch.inference_mode()
def check_decoding(model: LanguageModel, length: int = 48) -> float:
    """The largest difference of logits between reading a text at once and token by token, in the model's dtype.

    Raises:
        ArithmeticError: it is above the tolerance (in bf16: above that of 16 roundings, relative to the largest logit).
    """
    ids = _ids(model, length)
    want, state = model(ids)[0], None
    parts = []
    for t in range(length):
        logits, state = model(ids[:, t : t + 1], state)
        parts.append(logits)
    worst = float((torch.cat(parts, 1) - want).abs().max())
    # one rounding to bf16 is off by 2^-8 of a number at most
    bound = TOLERANCE if model.dtype == torch.float32 else 16 * 2**-8 * max(1.0, float(want.abs().max()))
    if not worst <= bound:
        raise ArithmeticError(
            f"{model.config.name} decodes logits that are off by {worst:.1e}, more than {bound:.1e}: not timed"
        )
    return worst


def _ids(model: LanguageModel, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=generator)
    return ids.to(model.device)
