"""Quantises a model's matrices to integers: round to nearest, or with calibration text, GPTQ's error feedback.

    quantize(model, bits, group)                  each group of columns gets the scale of least squared error; matrices
                                                  of GGUF's Q4_1 keep their integers
    quantize(model, bits, group, batches=ids)     columns not yet rounded compensate the output error of each rounded
                                                  column: GPTQ, arXiv 2210.17323

GPTQ is meant for 4 bits, where it removes a seventh to nearly half of the quality loss (docs/LOG.md). 8 bits lose next
to nothing either way.
"""

import copy
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retentive.data.sources import Document
from retentive.data.tokenizer import Tokenizer
from retentive.layers.quantized import Integers, Quantized, QuantizedEmbedding, QuantizedLinear
from retentive.models import LanguageModel
from retentive.options import option

BITS = {"int8": 8, "int4": 4}
GROUPS = {8: 128, 4: 32}
"""Default number of columns that share a scale, by bits."""
SCALES = 24
"""Number of scales tried for a group, besides that of Q8_0."""
MOST_CHARACTERS = 16
"""Maximum characters per token on average, which limits how much of a document is read."""
RANGES = 16
"""Number of ranges tried for a group with a minimum."""
AT_ONCE = 2**17
"""Numbers that are rounded at once: few enough to stay in the cache of a core."""
DAMPING = 0.01
"""Fraction of the Hessian's mean diagonal added to it, which bounds directions that the text does not contain."""


@dataclass(frozen=True)
class Quantization:
    """Storage of a model's matrices; in config.json, "quantization"."""

    bits: int
    """8 or 4."""
    group: int
    """Columns per scale, a multiple of 16 up to 256."""

    def __post_init__(self):
        if type(self.bits) is not int or self.bits not in BITS.values():
            raise ValueError(f"weights can have 8 or 4 bits, got {self.bits}")
        if type(self.group) is not int or self.group not in range(16, 257, 16):
            raise ValueError(f"{option('group', self.group)}: must be a multiple of 16 columns, up to 256")


def quantization_of(model: nn.Module) -> Quantization | None:
    """Returns the model's quantisation; None if it has none."""
    return next((Quantization(m.bits, m.group) for m in model.modules() if isinstance(m, Quantized)), None)


def check_quantizable(model: LanguageModel) -> None:
    """Raises ValueError for a model that cannot be quantised."""
    if model.config.library:
        raise ValueError(f"only models of this package can be quantised, this is one of {model.config.library}")
    if quantization_of(model):
        raise ValueError("the model is quantised already: name the one that it was quantised from")
    for name, x in model.named_parameters():
        if not bool(x.isfinite().all()):
            raise ValueError(f"the weights are damaged: {name} holds a number that is not finite")


def matrices(model: nn.Module) -> list[tuple[str, nn.Linear | nn.Embedding]]:
    """Returns the layers whose weights are quantised, by name."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and not name.startswith("encoders.")  # small beside the rest
    ]


def as_quantized(
    model: LanguageModel, how: Quantization, dtype: torch.dtype, *, minimums: Collection[str] = ()
) -> LanguageModel:
    """Replaces the matrices of `model`, in place, by integer ones that are yet to be filled.

    Args:
        minimums: names of the minimums that matrices have, as in `state_dict`.
    """
    for name, module in matrices(model):
        rows, columns = module.weight.shape
        least = f"{name}.minimum" in minimums
        with module.weight.device:
            if isinstance(module, nn.Linear):
                made: Quantized = QuantizedLinear(
                    rows, columns, how.bits, how.group, dtype, module.bias, minimums=least
                )
            else:
                made = QuantizedEmbedding(rows, columns, how.bits, how.group, dtype, minimums=least)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, made)
    if model.config.tie_embeddings:
        tie(model)
    return model


def float_tensors(model: LanguageModel) -> dict[str, Tensor]:
    """Returns all parameters by name, with floats in place of integer matrices."""
    found = dict[str, Tensor]()
    for name, x in model.named_parameters():
        owner, _, own = name.rpartition(".")
        layer = model.get_submodule(owner)
        if not isinstance(layer, Quantized):
            found[name] = x.detach()
        elif own in ("weight", "bias"):  # the rest is the scale and the minimum
            found[name] = layer.floats() if own == "weight" else x.detach()
    return found


def tie(model: Any) -> None:
    """Gives the quantised output matrix the embedding's integers."""
    model.head.weight, model.head.scale, model.head.minimum = (
        model.embed.weight, model.embed.scale, model.embed.minimum,
    )  # fmt: skip


@torch.no_grad()
def quantize(
    model: LanguageModel,
    bits: int,
    group: int | None = None,
    *,
    batches: Iterable[Tensor] = (),
    asymmetric: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    progress: Callable[[int, int], object] = lambda done, blocks: None,
) -> LanguageModel:
    """Returns a copy of the model with integers in place of its matrices.

    Args:
        bits: 8 or 4.
        group: columns that share a scale; by default 128 for 8 bits and 32 for 4.
        batches: ids `[B,T]` of calibration text; none: every group is rounded separately.
        asymmetric: give every group a minimum too, for 16 bits more: with 4 bits only.
        dtype: dtype of the new model's computation.
        progress: called with the number of blocks done, and of all blocks.

    Raises:
        ValueError: the model is of another library, already quantised, or has numbers that are not finite; bits or
            group are unsupported; or the model's activations on the text are not finite.
    """
    check_quantizable(model)
    how = Quantization(bits, GROUPS[bits] if group is None else group)
    if asymmetric and bits != 4:
        raise ValueError(f"`asymmetric` is for int4, whose few levels it spends better: leave it out with int{bits}")
    exact: Any = copy.deepcopy(model).float().eval()
    made: Any = as_quantized(copy.deepcopy(exact), how, torch.float32)
    streams = [exact.begin(ids) for ids in batches]
    for i, block in enumerate(exact.blocks):
        read = _second_moments(block, streams)
        for name, layer in block.named_modules():
            if isinstance(layer, nn.Linear):
                _fill(made.blocks[i].get_submodule(name), layer.weight, read.get(_reads(name)), asymmetric)
        streams = [(_through(made.blocks[i], *stream), stream[1]) for stream in streams]
        progress(i + 1, len(exact.blocks))
    moments = [_moment(exact.norm(x)) for x, _ in streams]
    moment = torch.stack(moments).sum(0) if moments else None
    _fill(made.head, exact.head.weight, moment, asymmetric)
    if model.config.tie_embeddings:  # as output matrix it needs more precision than as embedding (docs/LOG.md)
        made.embed.store(made.head.integers())
        tie(made)
    else:
        _fill(made.embed, exact.embed.weight, None, asymmetric)
    return made.to(dtype)


def _through(block, x, positions) -> Tensor:
    """Returns a block's output, without a state before it."""
    return block(x, None, positions, block.phases(positions, x.dtype))[0]


def _moment(x: Tensor) -> Tensor:
    """Returns `x^T x` over all rows, `[K,K]`, in float64."""
    rows = x.flatten(0, -2).double()
    return rows.T @ rows


def _reads(name: str) -> str:
    """Returns the first of the layers that read the same input as this one."""
    part, _, own = name.rpartition(".")
    first = {"up_proj": "gate_proj"}
    first |= dict.fromkeys(("k_proj", "v_proj", "g_proj", "decay_proj", "forget_proj"), "q_proj")
    return f"{part}.{first.get(own, own)}"


def _second_moments(block: nn.Module, streams: list) -> dict[str, Tensor]:
    """Returns second moments of the linear layers' inputs, by the first layer of each input; empty without streams."""
    found: dict[str, Tensor] = {}

    def watch(name: str):
        def hook(module, inputs):
            moment = _moment(inputs[0])
            found[name] = found[name] + moment if name in found else moment

        return hook

    layers = [(name, m) for name, m in block.named_modules() if isinstance(m, nn.Linear) and _reads(name) == name]
    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers]
    for x, positions in streams:
        _through(block, x, positions)
    for hook in hooks:  # on a copy of the model, so none matters after an error
        hook.remove()
    if not all(bool(moment.isfinite().all()) for moment in found.values()):
        raise ValueError("the model's activations on the text are not finite: nothing to calibrate on")
    return found


def _fill(into: Quantized, weight: Tensor, moment: Tensor | None, asymmetric: bool) -> None:
    how = weight, into.bits, into.group
    if moment is None:
        made = rounded(*how, asymmetric=asymmetric)
    else:
        made = on_grid(*how) or fed_back(weight, moment, into.bits, into.group, asymmetric=asymmetric)
    if not bool(made.scale.isfinite().all()):
        raise ValueError(f"a weight of {weight.abs().max():.3g} is too large for a scale of 16 bits")
    into.store(made)


def best_scale(w: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """Returns float16 scales `[rows]` with the least squared error of rounding w `[rows, columns]`, among SCALES.

    Args:
        importance: `[columns]`, weights of the squares.
    """
    top = 2 ** (bits - 1)
    # the largest number may become the most negative integer, -2^(bits-1), which has no counterpart: hence the sign
    at = w.abs().argmax(1, keepdim=True)
    full = -w.gather(1, at)[:, 0] / top
    best, least, error = full, torch.full_like(full, torch.inf), torch.empty_like(w)
    # the first: the largest number becomes 2^(bits-1) - 1, as in blocks of Q8_0, which it keeps as they are
    for factor in (-top / (top - 1), *(1.1 - 0.6 * step / SCALES for step in range(SCALES))):
        scale = (full * factor).half().to(w.dtype)
        torch.div(w, scale[:, None], out=error)  # NaN where both are 0, which is never the least
        error.round_().clamp_(-top, top - 1).mul_(scale[:, None]).sub_(w).square_()
        sums = (error if importance is None else error.mul_(importance)).sum(1)
        best, least = torch.where(sums < least, scale, best), torch.minimum(sums.nan_to_num(torch.inf), least)
    return best.half()


def best_range(w: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns float16 (scales, minimums) `[rows]` with the least squared error of rounding w `[rows, columns]` to 16
    levels, among RANGES that are narrower than its own; arguments as for `best_scale`."""
    low, high = w.amin(1), w.amax(1)
    centre, half, least = (low + high) / 2, (high - low) / 2, torch.full_like(low, torch.inf)
    best_scales, best_minimums = torch.zeros_like(low), low
    for step in range(RANGES):
        width = half * (1 - 0.5 * step / RANGES)
        scale, minimum = ((x.half().to(w.dtype)) for x in (2 * width / 15, centre - width))
        error = (_above(w, scale, minimum) * scale[:, None] + minimum[:, None] - w).square()
        sums = (error if importance is None else error * importance).sum(1)
        better = sums < least
        least = torch.where(better, sums, least)
        best_scales = torch.where(better, scale, best_scales)
        best_minimums = torch.where(better, minimum, best_minimums)
    return best_scales.half(), best_minimums.half()


def _above(w: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """Returns the nearest integers from 0 to 15 above the minimum; 0 if the scale is 0."""
    steps = (w - minimum[:, None]) / scale[:, None]
    return torch.where(scale[:, None] == 0, 0, steps).round().clamp(0, 15)


def _levels(w: Tensor, scale: Tensor, top: int) -> Tensor:
    """Returns the nearest integers from -top to top - 1; 0 if the scale is 0."""
    return torch.where(scale[:, None] == 0, 0, w / scale[:, None]).round().clamp(-top, top - 1)


def on_grid(w: Tensor, bits: int, group: int) -> Integers | None:
    """Returns the integers of a matrix whose groups lie on 16 levels, the least and the largest among them: one that
    was Q4_1 in a GGUF file. None for any other."""
    if bits != 4 or w.shape[1] % group:
        return None
    parts = w.float().unflatten(1, (-1, group))
    least = parts.amin(2)
    minimum, scale = least.half(), ((parts.amax(2) - least) / 15).half()
    if not torch.equal(minimum.float(), least) or not scale.any():  # the first holds for hardly any other matrix
        return None
    q = ((parts - least[:, :, None]) / scale.float()[:, :, None]).nan_to_num(0.0).round() - 8
    made = Integers(q.clamp(-8, 7).to(torch.int8).flatten(1), scale, minimum)
    return made if torch.equal(made.floats(group), w.float()) else None


def rounded(w: Tensor, bits: int, group: int, *, asymmetric: bool = False) -> Integers:
    """Returns the nearest integers: those of `on_grid` if there are any, else every group rounded separately."""
    if made := on_grid(w, bits, group):
        return made
    columns, at_once = w.shape[1], max(AT_ONCE // group, 1)
    parts = F.pad(w.float(), (0, -columns % group)).view(-1, group).split(at_once)
    q, scales, minimums = list[Tensor](), list[Tensor](), list[Tensor]()
    for part in parts:
        if asymmetric:
            scale, minimum = best_range(part)
            q.append((_above(part, scale.float(), minimum.float()) - 8).to(torch.int8))
            minimums.append(minimum)
        else:
            scale = best_scale(part, bits)
            q.append(_levels(part, scale.float(), 2 ** (bits - 1)).to(torch.int8))
        scales.append(scale)

    def laid(x: list[Tensor]) -> Tensor:
        return torch.cat(x).view(len(w), -1)

    return Integers(laid(q)[:, :columns], laid(scales), laid(minimums) if minimums else None)


def fed_back(w: Tensor, moment: Tensor, bits: int, group: int, *, asymmetric: bool = False) -> Integers:
    """Returns the same with GPTQ, in natural order of columns: later columns compensate each column's error, such that
    `|w x - scale q x|` is least for inputs with the given second moment `[columns, columns]`."""
    w, top = w.double().clone(), 2 ** (bits - 1)
    H = moment + DAMPING * moment.diagonal().mean().clamp(min=1e-9) * torch.eye(len(moment)).double()
    feed = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    q, scales, minimums = torch.zeros(w.shape, dtype=torch.int8), list[Tensor](), list[Tensor]()
    for begin in range(0, w.shape[1], group):
        end = min(begin + group, w.shape[1])
        part, importance = w[:, begin:end], feed.diagonal()[begin:end] ** -2
        if asymmetric:
            scale, minimum = best_range(part, importance)
            minimums.append(minimum)
            lowest = minimum.double()
        else:
            scale, lowest = best_scale(part, bits, importance), torch.zeros(len(w)).double()
        scales.append(scale)
        scale = scale.double()
        errors = torch.empty_like(part)
        for k in range(begin, end):
            column = w[:, k : k + 1]
            level = (_above(column, scale, lowest) if asymmetric else _levels(column, scale, top))[:, 0]
            q[:, k] = (level - 8 * asymmetric).to(torch.int8)
            errors[:, k - begin] = error = (w[:, k] - level * scale - lowest) / feed[k, k]
            w[:, k + 1 : end] -= error[:, None] * feed[k, k + 1 : end]
        w[:, end:] -= errors @ feed[begin:end, end:]
    return Integers(q, torch.stack(scales, 1), torch.stack(minimums, 1) if asymmetric else None)


def batches_of(documents: Iterable[Document], tokenizer: Tokenizer, *, tokens: int, length: int = 512) -> list[Tensor]:
    """Returns ids `[1,T]` for calibration: the beginnings of as many documents as possible, then what follows in each.

    Args:
        tokens: number of tokens in all, if there is enough text.
        length: number of tokens per part.

    Raises:
        ValueError: `tokens` is below 1.
    """
    if tokens < 1:
        raise ValueError(f"{option('tokens', tokens)}: calibration needs at least 1")
    parts: list[list[list[int]]] = []
    for document in islice(documents, -(-tokens // length)):
        ids = [tokenizer.eos_id, *tokenizer.encode(document.text[: tokens * MOST_CHARACTERS])]
        parts.append([ids[at : at + length] for at in range(0, len(ids), length)])
    in_turn = (part for round_ in zip_longest(*parts) for part in round_ if part)
    batches, left = [], tokens
    while left > 0 and (part := next(in_turn, None)):
        batches.append(torch.tensor([part[:left]]))
        left -= len(part)
    return batches
