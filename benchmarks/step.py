"""`python -m benchmarks step`: the decoding step against plain torch and against the time to read its memory.

A step goes through the states of many layers, as a model does: SPREAD bytes in all, so that no cache holds them. A
repetition is F = R / 2 tokens. A ring takes as many between two writes of its state, so each repetition has one write.
The correctness gate: 3 R steps of every rival against the recurrence in float64.

    ring     retention_step(..., state=Ring), by the fastest code                reads the state, writes it once in F
    plain    retention_step(..., state=tensor)                                   reads it and writes new ones
    torch    the recurrence in three operations of torch, in place               reads it three times, writes it twice

If states are larger than some MB (plain, large B), each new one is fresh memory from the system, and its page faults
cost more than the step.

The limit is the ring's memory traffic at this machine's read bandwidth: its state once, 1/F of it for writing, the rows
of k and v in the ring ((3 F + 1) / 2 on average), q, k, v and o. Two operations for four bytes count as nothing. The
bandwidth of a shared machine changes from second to second. So it is measured around every repetition, and the fraction
of the limit is the median over the repetitions.

One call over half a GB reaches that bandwidth. A small call never does: Python and waking the threads take some
microseconds, and prefetchers have to start. So each turn has one more repetition, in which torch only reads:
`torch.sum` of as many bytes as the limit counts, in memory that no cache holds, as often as a step is called.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.filesize import decimal
from torch import Tensor

from benchmarks.lab.roofline import DTYPES
from retentive import machine
from retentive.bench.lab import clock
from retentive.bench.lab.decoders import ring_bytes
from retentive.bench.lab.options import OnDevice, Say, silent, words
from retentive.bench.lab.plot import GREY, LOOKS, grid, legend, panel
from retentive.ops import Ring, retention_step
from retentive.ops import cpu as cpu_module
from retentive.ops.decay import log_decay
from retentive.ops.ring import slots
from retentive.options import at_least_one, known
from retentive.tables import duration, markdown, span

SPREAD = 1 << 29
"""Bytes of all states of a repetition: more than any cache holds."""
TOLERANCE = {"fp32": 2e-6, "bf16": 3e-3, "fp16": 4e-4}
"""Tolerance relative to the norm of the gold. fp32: rounding at 6e-8 over some hundred terms. bf16, fp16: o is rounded
once, by at most 2e-3 (2e-4) of itself; states and sums are float32."""


class Shape(NamedTuple):
    H: int
    K: int
    V: int


SHAPES = {"small": Shape(8, 64, 128), "1.3B": Shape(8, 256, 512), "6.7B": Shape(16, 256, 512)}
State = Tensor | Ring
PICTURE = "A decoding step"


class Rival(NamedTuple):
    open: Callable[[Tensor, torch.dtype], State]
    """(state, dtype of q, k and v) -> state for `step`."""
    step: Callable[[Tensor, Tensor, Tensor, Tensor, Any], tuple[Tensor, Any]]
    """(q, k, v, log_decay, state) -> (o, state)."""


def by_torch(q: Tensor, k: Tensor, v: Tensor, log_decay_H: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """(o, state) of the recurrence in torch; the state is updated in place to save memory traffic."""
    # in place: new tensors in every step would time the allocator too
    state.mul_(log_decay_H.exp()[:, None, None])
    state.addcmul_(k.to(state.dtype)[..., None], v.to(state.dtype)[..., None, :])
    return ((q.shape[-1] ** -0.5 * q.to(state.dtype))[..., None, :] @ state).squeeze(-2).to(v.dtype), state


RIVALS = {
    "ring": Rival(Ring.open, lambda q, k, v, g, s: retention_step(q, k, v, g, state=s)),
    "plain": Rival(lambda state, dtype: state, lambda q, k, v, g, s: retention_step(q, k, v, g, state=s)),
    "torch": Rival(lambda state, dtype: state, by_torch),
}


@dataclass(frozen=True, kw_only=True)
class Options(OnDevice):
    """The decoding step of one layer beside plain torch and the time to read its state."""

    shapes: tuple[str, ...] = ("small", "1.3B")
    """Shapes: small, 1.3B, 6.7B."""
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Sequences decoded together."""
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    """Dtypes of q, k and v: fp32, bf16, fp16. The state is float32."""
    repeats: int = 5
    """Repetitions timed of each; the best counts."""


@torch.inference_mode()
def measure(options: Options, say: Say = silent) -> dict[str, Any]:
    """A row per shape, dtype of q, k, v and batch: seconds a step of every rival, and its fraction of the limit.

    Raises:
        ValueError: an unknown shape or dtype, a number below 1.
        ArithmeticError: a gate failed; nothing of that shape and dtype was timed.
    """
    shapes, dtypes, device = words(options.shapes), words(options.dtypes), options.torch_device
    known(shapes, SHAPES, "shape")
    known(dtypes, DTYPES, "dtype")
    at_least_one(options, "batches", "repeats")
    rows: list[dict[str, Any]] = []
    for name, dtype in product(shapes, dtypes):
        shape = SHAPES[name]
        # once for all batches: the gate has its own batch
        errors = {rival: check(rival, shape, dtype, device) for rival in RIVALS}
        for B in options.batches:
            results, rates, alone = interleaved(shape, B, dtype, device, options.repeats)
            row = {"shape": name, "B": B, **shape._asdict(), "dtype": dtype, "contestants": results}
            rows.append(finish(row, rates, alone, errors))
            say(f"{name} B={B} {dtype}: " + ", ".join(f"{n} {duration(r['seconds'])}" for n, r in results.items()))
    return {
        "what": "decoding step of one layer",
        "hardware": machine.describe(),
        "device": str(device),
        "ring_backend": backend(device, dtypes[0]),
        "rows": rows,
    }


def backend(device: torch.device, dtype: str) -> str:
    """The code that computes a step with a ring here, for the table."""
    if device.type == "cuda" and find_spec("triton") is not None:
        return "triton"
    return "cpu" if device.type == "cpu" and cpu_module.unavailable(DTYPES[dtype]) is None else "torch"


def check(name: str, shape: Shape, dtype: str, device: torch.device) -> float:
    """Largest error of the rival's outputs and last state, relative to their norm, over 3 R steps from some state.

    Raises:
        ArithmeticError: the error is above the tolerance, or NaN.
    """
    H, K, V = shape
    B, tokens = 3, 3 * slots(K, V)  # several folds, and every slot used more than once
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(tokens, B, H, n, generator=generator).to(device, DTYPES[dtype]) for n in (K, K, V))
    # from a nonzero state, so that its decay is checked too
    start = torch.randn(B, H, K, V, generator=generator).to(device)
    decays, outputs, golds = log_decay("paper", H, device=device), [], []
    state, gold = RIVALS[name].open(start.clone(), DTYPES[dtype]), start.double()  # updated in place
    gamma = log_decay("paper", H, device=device, dtype=torch.float64).exp()[:, None, None]
    for t in range(tokens):
        o, state = RIVALS[name].step(q[t], k[t], v[t], decays, state)
        gold = gamma * gold + k[t].double()[..., None] * v[t].double()[..., None, :]
        outputs.append(o.double())
        golds.append(K**-0.5 * torch.einsum("bhk,bhkv->bhv", q[t].double(), gold))
    last = state.to_state() if isinstance(state, Ring) else state
    pairs = ((torch.stack(outputs), torch.stack(golds)), (last.double(), gold))
    errors = [float((x - y).norm() / y.norm()) for x, y in pairs]
    for error, part in zip(errors, ("o", "the state"), strict=True):
        if not error <= TOLERANCE[dtype]:
            raise ArithmeticError(
                f"the step by {name} is wrong at H={H}, K={K}, V={V} in {dtype}: {part} is off by {error:.1e} of its "
                f"norm, more than {TOLERANCE[dtype]:.0e}: not timed"
            )
    return max(errors)


def interleaved(
    shape: Shape, B: int, dtype: str, device: torch.device, repeats: int
) -> tuple[dict[str, dict[str, Any]], list[float], dict[str, float]]:
    """Measure one step of one layer, with the rivals interleaved.

    Returns:
        per rival the seconds, the fraction of the limit, and the time of reading alone relative to its own; the read
        bandwidths; the seconds and the fraction of the limit of reading alone.
    """
    H, K, V = shape
    nbytes, numbers = ring_bytes(B, H, K, V, DTYPES[dtype].itemsize), machine.numbers(device)
    # rounded up: together at least SPREAD bytes
    layers, tokens = -(-SPREAD // (4 * B * H * K * V)), slots(K, V) // 2
    q, k, v = (torch.randn(B, H, n, device=device).to(DTYPES[dtype]) for n in (K, K, V))
    decays = log_decay("paper", H, device=device)
    pieces = in_pieces(numbers, nbytes)
    # allocated once, so that `reads` only reads
    sums = torch.empty(pieces[0].shape[0], device=device)

    def steps(step: Callable, states: list[Any]) -> None:
        for _ in range(tokens):
            # layer by layer, as in a model: a state has left every cache before its next step
            for n, state in enumerate(states):
                _, states[n] = step(q, k, v, decays, state)

    def reads() -> None:
        for piece in pieces:
            torch.sum(piece, -1, out=sums)

    runs: dict[str, Callable[[], None]] = {"alone": reads}
    for name, one in RIVALS.items():
        # written, because untouched pages are all one page of zeros, which the CPU's cache holds
        states = [one.open(s, DTYPES[dtype]) for s in torch.randn(layers, B, H, K, V, device=device)]
        runs[name] = partial(steps, one.step, states)
    timed, rates = clock.beside_reading(runs, numbers, repeats=repeats)
    # `alone` counts as a step for every `nbytes` that it reads, so that its seconds compare with a step's
    steps_in = dict.fromkeys(runs, float(tokens * layers)) | {"alone": pieces[0].nbytes * len(pieces) / nbytes}
    seconds = {name: [one.seconds / steps_in[name] for one in timed[name]] for name in runs}

    def summary(name: str) -> dict[str, Any]:
        # each by the bandwidth around it, then the median: the bandwidth changes from second to second
        fractions = [nbytes / s / one.rate for s, one in zip(seconds[name], timed[name], strict=True)]
        return clock.best(seconds[name]) | {"fraction": statistics.median(fractions)}

    def of_reading(name: str) -> float:
        return statistics.median(read / own for read, own in zip(seconds["alone"], seconds[name], strict=True))

    results = {name: summary(name) | {"of_reading": of_reading(name)} for name in RIVALS}
    return results, rates, summary("alone")


def in_pieces(numbers: Tensor, nbytes: int) -> list[Tensor]:
    """Cut `numbers` into tensors of whole rows, about `nbytes`, as `machine.read_rate` sums in a call."""
    each = min(max(round(nbytes / numbers[0].nbytes), 1), len(numbers))
    return list(numbers[: len(numbers) // each * each].split(each))


def finish(row: dict[str, Any], read: list[float], alone: dict[str, float], errors: dict[str, float]) -> dict[str, Any]:
    """Add the machine's bandwidth, the limit, reading alone, and each rival's error at the gate to the row."""
    B, H, K, V = (row[n] for n in "BHKV")
    nbytes = ring_bytes(B, H, K, V, DTYPES[row["dtype"]].itemsize)
    for name, result in row["contestants"].items():
        result["gate_error"] = errors[name]
    return row | {
        "state_bytes": 4 * B * H * K * V,
        "slots": slots(K, V),
        "machine": {"read": clock.spread(read), "alone": alone},
        "limit": {"bytes": nbytes, "seconds": nbytes / statistics.median(read), "by": "memory"},
    }


def table(result: dict[str, Any]) -> str:
    """The rows as a Markdown table, with the machine below."""
    heads = ["shape", "B", "inputs", "state", f"ring ({result['ring_backend']})", "of the limit", "of reading alone"]
    heads += ["plain", "torch", "tokens/s of a layer"]
    lines = []
    for row in result["rows"]:
        ring, plain, torch_ = (row["contestants"][name] for name in RIVALS)
        cells = [f"{row['shape']} ({row['H']} x {row['K']}/{row['V']})", str(row["B"]), row["dtype"]]
        cells += [decimal(row["state_bytes"]), duration(ring["seconds"]), f"{ring['fraction']:.0%}"]
        # missing in older files of results
        cells.append(f"{ring['of_reading']:.0%}" if "of_reading" in ring else "–")
        cells += [f"{other['seconds'] / ring['seconds']:.2f}x" for other in (plain, torch_)]
        lines.append([*cells, f"{row['B'] / ring['seconds']:,.0f}"])
    read = [rate / 1e9 for row in result["rows"] for rate in row["machine"]["read"].values()]
    where = result["hardware"]["cpu" if result["device"] == "cpu" else "gpu"]
    notes = [
        "Seconds a step and layer; plain and torch as multiples of the ring's. The limit is what a ring must read and "
        "write, at the rate of reading half a GB, in the median of the repetitions; reading alone is torch's sum of as "
        "many bytes, called as often (retentive/bench/step.py).",
        f"This machine meanwhile: reading {span(read)} GB/s ({where}).",
    ]
    return "\n\n".join([markdown(heads, lines), "\n".join(f"- {note}" for note in notes)])


def plot(result: dict[str, Any], path: str | Path, *, title: str) -> None:
    """A PNG, a column for each shape and dtype: time of a step and fraction of the limit against the batch."""
    columns = list(dict.fromkeys((row["shape"], row["dtype"]) for row in result["rows"]))
    figure, axes = grid(title, 2, len(columns), size=(4.4, 3.6))
    along = "sequences decoded together"
    names = {name: name for name in RIVALS} | {"alone": "reading alone", "limit": "limit"}
    looks = dict(zip(RIVALS, LOOKS, strict=False)) | {"alone": {"color": "0.3", "linewidth": 1}, "limit": GREY}
    for (time, fraction), column in zip(axes.T, columns, strict=True):
        rows = [row for row in result["rows"] if (row["shape"], row["dtype"]) == column]
        shape = "{} heads, K = {}, V = {}".format(*(rows[0][n] for n in "HKV"))
        time.set_title(f"{', '.join(column)}\n{shape}", fontsize=9)
        # older files of results lack "alone"
        bounds = [{"limit": {"seconds": r["limit"]["seconds"]}, "alone": r["machine"].get("alone", {})} for r in rows]
        points = [(row["B"], row["contestants"] | bound) for row, bound in zip(rows, bounds, strict=True)]
        panel(time, points, names, "seconds", "one step of one layer (us)", along, unit=1e-6, looks=looks)
        panel(fraction, points, names, "fraction", "of the limit", along, percent=True, looks=looks)
    legend(figure, axes)
    figure.savefig(path, dpi=120, format="png")
