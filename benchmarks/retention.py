"""`python -m benchmarks retention`: the operator against its rivals and the machine's limit.

For each shape and dtype it runs the correctness gate and measures the machine's rates. For each length it measures the
memory of every rival in a process of its own, and times interleaved forward and backward passes, of which the best
counts. Then it measures the rates again. A rival slower than LONG seconds runs once, in the process that measures its
memory. A missing time is replaced by its reason.
"""

import statistics
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.lab import gate, isolated, rivals
from benchmarks.lab.rivals import Rival
from benchmarks.lab.roofline import DTYPES, Work, limit
from benchmarks.retention_report import plot, table
from retentive import machine
from retentive.bench.lab import clock
from retentive.bench.lab.options import OnDevice, Say, silent, words
from retentive.ops import cpu as cpu_module
from retentive.options import at_least_one, known
from retentive.tables import duration

__all__ = ["PICTURE", "Options", "measure", "plot", "table"]

LONG = 20.0
"""Seconds of a forward and backward pass above which it is not repeated."""
CLOSE = 1.5
"""Chunk lengths of torchscale are timed further if their first pass takes at most this multiple of the best one's."""


class Shape(NamedTuple):
    B: int
    H: int
    K: int
    V: int
    lengths: tuple[int, ...]


SHAPES = {
    "5m": Shape(8, 4, 64, 112, (512, 1024)),
    "small": Shape(1, 8, 64, 128, (2048, 8192, 32768)),
    "medium": Shape(1, 8, 128, 256, (2048, 8192, 32768)),
    "1.3B": Shape(1, 8, 256, 512, (2048, 8192, 32768)),
    "6.7B": Shape(1, 16, 256, 512, (2048, 8192)),
    "long": Shape(1, 8, 64, 128, (32768, 65536, 131072)),
}
"""Shapes. 5m: a training batch of our own small model. small, medium: heads a quarter and half of the paper's
size. 1.3B, 6.7B: the paper's models, 2,048 and 4,096 wide with heads of 256. long: lengths out of reach for quadratic
time."""


PICTURE = "Retention"


@dataclass(frozen=True, kw_only=True)
class Options(OnDevice):
    """The operator: time and memory of forward and backward passes beside its rivals and the machine's limit."""

    shapes: tuple[str, ...] = ("small", "1.3B")
    """Shapes: 5m (heads of our small model), small, medium (a quarter and half of the paper's), 1.3B, 6.7B, long."""
    lengths: tuple[int, ...] = ()
    """Sequence lengths. Default: each shape's own."""
    dtypes: tuple[str, ...] = ("fp32",)
    """Dtypes of q, k and v: fp32, bf16, fp16."""
    rivals: tuple[str, ...] = ("auto",)
    """Rivals: torchscale, sdpa, fla; auto takes all installed ones, none takes none."""
    repeats: int = 5
    """Timed passes of each; the best counts. Passes above 20 s run once."""
    patience: float = 600
    """Maximum seconds of a pass; a slower rival is left out, and the table says so."""


def measure(options: Options, say: Say = silent) -> dict[str, Any]:
    """Rows of all shapes, dtypes and lengths, with the machine's rates.

    Raises:
        ValueError: an unknown name, a number below 1, or a rival requested by name that cannot run.
        ArithmeticError: a gate failed; nothing of that shape and dtype was timed.
    """
    shapes, dtypes, device = words(options.shapes), words(options.dtypes), options.torch_device
    known(shapes, SHAPES, "shape")
    known(dtypes, DTYPES, "dtype")
    at_least_one(options, "repeats", *(["lengths"] if options.lengths else []))
    names, absent = chosen(words(options.rivals), device)
    rows: list[dict[str, Any]] = []
    for shape, dtype in product(shapes, dtypes):
        B, H, K, V, own = SHAPES[shape]
        works = [Work(B, H, K, V, T, dtype, str(device)) for T in options.lengths or own]
        rows += group(shape, works, names, options, say)
    return {
        "what": "retention: time and memory of forward and backward",
        "hardware": machine.describe(),
        "device": str(device),
        "no_compiled_kernel": cpu_module.unavailable() if device.type == "cpu" else None,
        "rivals": {name: rivals.version(name) for name in names if name not in rivals.OURS} | absent,
        "rows": rows,
    }


def chosen(asked: list[str], device: torch.device) -> tuple[list[str], dict[str, str]]:
    """(rivals that run, ours first; reasons why the others do not). "auto" requests all of them, "none" none.

    Raises:
        ValueError: an unknown name, or a rival requested by name that cannot run.
    """
    known(asked, ("auto", "none", *rivals.OTHERS), "rival")
    names = rivals.OTHERS if "auto" in asked else [name for name in asked if name != "none"]
    absent = {name: why for name in names if (why := rivals.missing(name, device))}
    if absent and "auto" not in asked:
        raise ValueError("; ".join(f"rival {name!r}: {why}" for name, why in absent.items()))
    return [*rivals.OURS, *(name for name in names if name not in absent)], absent


def group(shape: str, works: list[Work], names: list[str], options: Options, say: Say) -> list[dict[str, Any]]:
    """The rows of one shape and dtype."""
    device = torch.device(works[0].device)
    # torchscale is checked below, for the chunk lengths that are timed; SDPA is another function
    errors = {name: gate.check(name, works[0]) for name in names if name not in ("torchscale", "sdpa")}
    # before and after all lengths: a difference between the two shows other work on the machine
    before = machine.rates(device, works[0].torch_dtype)
    rows = []
    for work in works:
        ways = {name: prepare(name, work, options.patience) for name in names}
        for way in ways.get("torchscale", []):
            if "skipped" not in way:
                error = gate.check("torchscale", work, way["chunk"])
                errors["torchscale"] = max(errors.get("torchscale", 0), error)
        interleaved([(name, way) for name in names for way in ways[name]], work, options.repeats)
        results = {name: quickest(ways[name]) for name in names}
        rows.append({"shape": shape, **vars(work), "qkvo_bytes": work.qkvo_bytes, "contestants": results})
        say(line(rows[-1]))
    after = machine.rates(device, works[0].torch_dtype)
    for row, work in zip(rows, works, strict=True):
        finish(row, work, before, after)
        for name, result in row["contestants"].items():
            if name in errors and "seconds" in result:
                result["gate_error"] = errors[name]
    return rows


def prepare(name: str, work: Work, patience: float) -> list[dict[str, Any]]:
    """Prepare a rival: its settings, memory and first time, or the reason why it does not run ("skipped").

    Returns one dictionary, for torchscale one for each chunk length that may be its best.
    """
    if name != "torchscale":
        return [_prepare(name, work, None, patience)]
    ways: list[dict[str, Any]] = []
    # from the longest chunk down, until shorter ones get slower
    for chunk in sorted(rivals.CHUNKS, reverse=True):
        if work.T % chunk == 0:
            ways.append(_prepare(name, work, chunk, patience))
            best = min(_seconds(way) for way in ways)
            if _seconds(ways[-1]) > CLOSE * best:
                break  # shorter chunks keep more states, and are slower still
    if not ways:
        return [{"skipped": f"needs a multiple of {rivals.CHUNKS[0]} tokens"}]
    # the file records all chunk lengths tried
    tried = {str(way["chunk"]): way.get("seconds", way.get("skipped")) for way in ways}
    return [way | {"tried": tried} for way in ways if _seconds(way) <= CLOSE * best]


def _seconds(way: dict[str, Any]) -> float:
    return way.get("seconds", float("inf"))


def _prepare(name: str, work: Work, chunk: int | None, patience: float) -> dict[str, Any]:
    one = rivals.make(name, work, chunk)
    result = {"backend": one.backend, "chunk": one.chunk}
    try:
        expected = estimate(name, work, one)
        # estimated from a short pass, since a running pass cannot be cancelled
        if expected > patience:
            return result | {"skipped": f"would take {expected:.0f} s"}
        return result | isolated.in_own_process(name, work, one.chunk)
    except (MemoryError, RuntimeError) as error:
        if not isolated.is_of_memory(error):
            raise
        return result | {"skipped": isolated.NO_MEMORY}


def quickest(ways: list[dict[str, Any]]) -> dict[str, Any]:
    """The way with the best time, and the times of the others."""
    best = min(ways, key=_seconds)
    if "tried" in best:
        # the best of the repetitions, beside "tried", which has the first pass only
        best["seconds_by_chunk"] = {str(way["chunk"]): way["seconds"] for way in ways if "seconds" in way}
    return best


def estimate(name: str, work: Work, one: Rival) -> float:
    """Estimated seconds of a pass, from a short pass and the FLOPs; 0 if the pass is short itself."""
    short = replace(work, T=min(work.T, 2048))  # torchscale's chunks divide 2048
    if short == work:
        return 0
    # by counted FLOPs, which is good enough to tell seconds from hours
    return warm(rivals.make(name, short, one.chunk), short) * one.flops(work) / one.flops(short)


def warm(one: Rival, work: Work) -> float:
    """Seconds of a forward and backward pass after a warm-up pass."""
    inputs = isolated.tensors(one, work)
    return [machine.clock(torch.device(work.device), lambda: isolated.both(one, inputs)) for _ in range(2)][1]


def interleaved(ways: list[tuple[str, dict[str, Any]]], work: Work, repeats: int) -> None:
    """Time all ways that are fast enough to repeat, and write the times into their dictionaries."""
    device = torch.device(work.device)
    # seconds of the isolated pass for all; fast ways get better numbers below
    ready = [(name, way) for name, way in ways if "skipped" not in way]
    for _, way in ready:
        way |= {"repeats": 1, "median_seconds": way["seconds"]}
    quick = [(name, way) for name, way in ready if way["seconds"] <= LONG]
    if not quick:
        return
    ones = [rivals.make(name, work, way["chunk"]) for name, way in quick]
    inputs = isolated.flat(work, ones)  # one set for all rivals, each with its own view, to save memory
    times: list[list[tuple[float, float]]] = [[] for _ in ones]
    for _ in range(repeats + 1):
        for (_, way), one, measured in zip(quick, ones, times, strict=True):
            # LONG is also the time budget of all repetitions of one way; the first is a warm-up and does not count
            if (len(measured) - 1) * way["seconds"] <= LONG:
                measured.append(both_and_forward(one, isolated.tensors(one, work, inputs), device))
    for (_, way), measured in zip(quick, times, strict=True):
        whole, part = ([pair[i] for pair in measured[1:]] for i in (0, 1))
        way |= {
            **clock.best(whole),
            "forward_seconds": min(part),
            "median_forward_seconds": statistics.median(part),
        }


def both_and_forward(one: Rival, inputs: list[Tensor], device: torch.device) -> tuple[float, float]:
    """(seconds of both passes, seconds of a forward pass that keeps nothing for a backward pass)."""
    seconds = machine.clock(device, lambda: isolated.both(one, inputs))
    with torch.no_grad():
        return seconds, machine.clock(device, lambda: one.run(*inputs[:3]))


def finish(row: dict[str, Any], work: Work, before: dict[str, float], after: dict[str, float]) -> None:
    """Add the machine's rates, the limit, and the fraction of it that each rival reaches to the row.

    All retentions share the limit for our backend's chunk length; attention has its own.
    """
    # one speed for all of a group's rows: the mean of its beginning and its end
    rates = {name: (before[name] + after[name]) / 2 for name in before}
    _, chunk = rivals.taken(work, "auto")
    row["machine"] = {"before": before, "after": after}
    for backward, key in ((True, "limit"), (False, "forward_limit")):
        flops, nbytes = work.flops(chunk, backward=backward), work.bytes(backward=backward)
        least = limit(flops, nbytes, rates["gemm"], rates["read"])
        row[key] = {"flops": flops, "bytes": nbytes, "seconds": least.seconds, "by": least.by}
        for name, result in row["contestants"].items():
            seconds = result.get("seconds" if backward else "forward_seconds")
            if seconds:
                # as many numbers in q, k, v and o, but other arithmetic
                own = work.attention_flops(backward=backward) if name == "sdpa" else flops
                fraction = limit(own, nbytes, rates["gemm"], rates["read"]).seconds / seconds
                result["fraction" if backward else "forward_fraction"] = fraction


def line(row: dict[str, Any]) -> str:
    """A row as one line of progress."""
    said = []
    for name, result in row["contestants"].items():
        how = duration(result["seconds"]) if "seconds" in result else result["skipped"]
        said.append(f"{name} {how}")
    return f"{row['shape']} T={row['T']} {row['dtype']}: {', '.join(said)}"
