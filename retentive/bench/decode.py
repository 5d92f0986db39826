"""`retentive bench decode`: memory, throughput and latency of decoding by context and batch (the paper's Figure 6).

A step decodes one token of every sequence. States and caches are filled with random numbers: the cost of a step does
not depend on them, and reading 32k tokens would take hours. Repetitions of the rivals are interleaved. The correctness
gate: each model of ours must decode, token by token, the logits of a text read at once.

    memory      weights, and the state with its ring of newest tokens, or the cache at that context
    limit       roofline: the bytes a step must move (all weights but the embedding; the state and its share of writes;
                keys and values, read) at the rate of reading, or its FLOPs at the GEMM rate, whichever is longer. The
                rate of reading is measured around every repetition
"""

import gc
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal

from retentive import machine
from retentive.bench.lab import clock, models, neighbour
from retentive.bench.lab.decoders import Decoding, Rival, make
from retentive.bench.lab.options import OnDevice, Say, Sized, silent
from retentive.bench.lab.plot import grid, legend, panel, tokens
from retentive.infer.decoder import STATES
from retentive.models import cost
from retentive.options import at_least_one, known
from retentive.tables import counted, duration, markdown

LATENCY_AT = 8192
"""Context length at which the picture shows the latency."""
RETNETS = {"retnet", "native-bf16", "native-int8", "native-int4", "native-w8a8", "native-w4a8"}
TRANSFORMERS = {name for name in models.NAMES if name not in RETNETS and "hybrid" not in name}
PICTURE = "Decoding ({size})"


@dataclass(frozen=True, kw_only=True)
class Options(OnDevice, Sized):
    """Decoding: memory, throughput and latency by context and batch, of RetNet and its twins (the paper's Figure 6)."""

    contexts: tuple[int, ...] = (512, 2048, 8192, 32768)
    """Context lengths in tokens."""
    batches: tuple[int, ...] = (1, 8)
    """Batch sizes: sequences decoded together."""
    models: tuple[str, ...] = tuple(models.NAMES)
    """Models: retnet (needed), transformer, grouped (the twin with grouped heads), hybrid, llama (of transformers). In
    C, with -bf16, -int8 or -int4: native, native-twin (the grouped twin), native-hybrid; with activations of 8 bits
    beside weights of 8 or 4: native-w8a8, native-w4a8. Of llama.cpp, if installed, the grouped twin: llamacpp-f16,
    llamacpp-q8_0, llamacpp-q4_0."""
    precision: str = "bf16"
    """Precision of weights and caches of the models in PyTorch, bf16 or fp32. Their states are float32."""
    state_precision: str = "fp32"
    """Precision of retention states of the models in C: fp32, bf16 or int8."""
    full_heads: bool = False
    """Give the twin in C and in llama.cpp a key head for every query head, as in `transformer`."""
    steps: int = 16
    """Tokens decoded per repetition."""
    repeats: int = 3
    """Timed repetitions of each model, interleaved; the best counts."""
    neighbour: bool = False
    """Also time the RetNets beside one other busy process, at all batches and the first context."""


@torch.inference_mode()
def measure(options: Options, say: Say = silent) -> dict[str, Any]:
    """Returns a row per batch and context: seconds per step, memory and fraction of the limit of every rival.

    Raises:
        ValueError: a name or precision is unknown, or a number is below 1.
        ArithmeticError: a correctness gate failed; nothing was timed.
    """
    config, device = options.config, options.torch_device
    known([options.precision], models.PRECISIONS, "precision")
    models.check_states(options.state_precision, options.models)
    at_least_one(options, "contexts", "batches", "steps", "repeats")
    dtype, names = models.PRECISIONS[options.precision], models.chosen(options.models, models.NAMES, device, say)
    # made once for all batches and contexts, which differ only in their states
    rivals = {
        name: make(
            name, config, device, dtype, full_heads=options.full_heads, state_dtype=STATES[options.state_precision]
        )
        for name in names
    }
    for one in rivals.values():
        one.check()  # all before anything is timed, since a wrong step may be fast
    rows = []
    # sorted and unique, as tables and curves need them
    for batch in sorted(set(options.batches)):
        for context in sorted(set(options.contexts)):
            row: dict[str, Any] = {"batch": batch, "context": context}
            row["models"] = interleaved(rivals, batch, context, options)
            rows.append(row)
            told = ", ".join(f"{name} {_told(r)}" for name, r in row["models"].items())
            say(f"batch {batch}, context {context:,}: {told}")
    result = {
        "size": options.size,
        "vocab_size": options.vocab_size,
        "what": "decoding",
        "hardware": machine.describe(),
        "device": str(device),
        "precision": options.precision,
        "state_precision": options.state_precision,
        "heads": {
            name: [getattr(one.config.without_convolutions().mixers[0], h) for h in ("heads", "kv_heads")]
            for name, one in rivals.items()
        },
        "parameters": {name: cost.parameters(one.config) for name, one in rivals.items()},
        # first context at which the cache, which grows by remembers(1, 1) a token, is larger than state and ring
        "break_even": {
            name: rivals["retnet"].remembers(1, 0) // one.remembers(1, 1) + 1
            for name, one in rivals.items()
            if name in ("transformer", "grouped")
        },
        "rows": rows,
    }
    if options.neighbour:
        result["neighbours"] = [
            beside_neighbour(rivals[name], batch, options)
            for batch in sorted(set(options.batches))
            for name in rivals
            if name in RETNETS
        ]
    return result


def beside_neighbour(rival: Rival, batch: int, options: Options) -> dict[str, Any]:
    """Returns the seconds per step, alone and beside a busy process."""
    context = options.contexts[0]
    # no room needed: a state takes any number of further tokens
    decoding = Decoding(rival, batch, context, options.steps)
    kept = neighbour.speed_kept(decoding.run, rival.device, repeats=options.repeats)
    kept |= {key: kept[key] / options.steps for key in ("quiet_seconds", "beside_seconds")}
    return {"model": rival.name, "batch": batch, "context": context, **kept}


def _told(result: dict[str, Any]) -> str:
    return result.get("skipped") or duration(result["seconds"])


def batches_that_fit(
    rivals: dict[str, Rival], batch: int, context: int, free: int
) -> tuple[list[list[str]], list[str]]:
    """Returns (groups of rivals whose states fit in `free` bytes together, in order; rivals that do not fit alone)."""
    found: list[list[str]] = [[]]
    left_out, taken = [], 0
    for name, one in rivals.items():
        need = one.remembers(batch, context)
        if need > free:
            left_out.append(name)
            continue
        # as many as fit, in the given order; only rivals of one group are interleaved
        if taken + need > free:
            found.append([])
            taken = 0
        found[-1].append(name)
        taken += need
    return found, left_out


def interleaved(rivals: dict[str, Rival], batch: int, context: int, options: Options) -> dict[str, dict[str, Any]]:
    """Returns seconds per step, memory and fraction of the limit of every rival, interleaved if memory allows."""
    gc.collect()  # frees the states of the last row before asking for the free memory
    device = next(iter(rivals.values())).device
    together, left_out = batches_that_fit(rivals, batch, context, int(0.8 * machine.free_memory(device)))
    # a fifth of free memory is left to activations and other processes
    results: dict[str, dict[str, Any]] = {name: {"skipped": "not enough memory"} for name in left_out}
    for names in filter(None, together):
        results |= timed({name: rivals[name] for name in names}, batch, context, options)
        gc.collect()
        machine.free_memory(device)  # called for its first step: it gives freed memory back to the system
    return {name: results[name] for name in rivals}


def timed(rivals: dict[str, Rival], batch: int, context: int, options: Options) -> dict[str, dict[str, Any]]:
    """Returns seconds per step (best and median repetition), memory and fraction of the limit of every rival."""
    one = next(iter(rivals.values()))
    device, dtype = one.device, one.dtype
    # one more turn than counts: the first warms up
    room = (options.repeats + 1) * options.steps
    runs = {name: Decoding(one, batch, context, options.steps, room).run for name, one in rivals.items()}
    # measured once and not around each repetition, since matrix products rarely bound a step
    gemm = machine.gemm_rate(device, dtype)
    found, _ = clock.beside_reading(runs, machine.numbers(device), repeats=options.repeats)
    results = {}
    for name, one in rivals.items():
        seconds = [repetition.seconds / options.steps for repetition in found[name]]
        computing = batch * cost.flops_per_token(one.config, context) / gemm
        # the roofline of each repetition, at the rate of reading around it
        limits = [max(one.moves(batch, context) / repetition.rate, computing) for repetition in found[name]]
        results[name] = {
            **clock.best(seconds),
            "tokens_per_second": batch / min(seconds),
            "state_bytes": one.remembers(batch, context),
            "memory_bytes": int(cost.parameters(one.config) * one.bytes_per_weight) + one.remembers(batch, context),
            "fraction": statistics.median(a / b for a, b in zip(limits, seconds, strict=True)),
        }
    return results


def table(result: dict[str, Any]) -> str:
    """Returns the rows as a Markdown table, and notes: its terms, and from which context the state is smaller."""
    names = list(result["parameters"])
    heads = ["batch", "context", *(f"{models.label(name, result)}: a step" for name in names)]
    heads += [f"{models.label(name, result)}: memory" for name in names]
    lines = []
    for row in result["rows"]:
        base, cells = row["models"]["retnet"], [str(row["batch"]), f"{row['context']:,}"]
        for name in names:
            other = row["models"][name]
            limit = f", {other['fraction']:.0%}" if "fraction" in other else ""
            cells.append(_told(other) + ("" if name == "retnet" else _times(other, base, "seconds")) + limit)
        for name in names:
            other = row["models"][name]
            times = "" if name == "retnet" else _times(other, base, "memory_bytes")
            cells.append(decimal(other["memory_bytes"]) + times if "memory_bytes" in other else "–")
        lines.append(cells)
    notes = [
        "- %: the time that a step needs by memory and arithmetic alone, as a part of its time. x: how many times the "
        "time or memory of RetNet. Memory is that of weights and of states or caches."
    ]
    notes += [
        f"- The float32 state with its ring is smaller than the cache of {models.NAMES[name]} from "
        f"{counted(n, 'token')} of context."
        for name, n in result["break_even"].items()
    ]
    notes += filter(
        None, (fastest(result["rows"], batch) for batch in dict.fromkeys(r["batch"] for r in result["rows"]))
    )
    # results from before the models in C hold one
    for at in result.get("neighbours") or filter(None, [result.get("neighbour")]):
        name = models.NAMES[at.get("model", "retnet")]
        notes.append(neighbour.note(at, f"a step of {name} (batch {at['batch']}, context {at['context']:,})"))
    return "\n\n".join([markdown(heads, lines), "\n".join(notes)])


def _times(other: dict[str, Any], base: dict[str, Any], key: str) -> str:
    # above 1: the other takes longer, or more memory
    return f" ({other[key] / base[key]:.2f}x)" if key in other and key in base else ""


def fastest(rows: list[dict[str, Any]], batch: int) -> str | None:
    """Returns a line on the fastest RetNet and Transformer, at the longest context at which both were measured.

    Beside Transformers in PyTorch alone, RetNets in C are left out: the line would be about C.
    """
    for row in sorted((r for r in rows if r["batch"] == batch), key=lambda r: r["context"], reverse=True):
        seconds = {name: of["seconds"] for name, of in row["models"].items() if "seconds" in of}
        if not seconds.keys() & TRANSFORMERS & models.IN_C:
            seconds = {name: of for name, of in seconds.items() if name not in models.IN_C}
        ours, theirs = (sorted(seconds.keys() & kind, key=lambda n: seconds[n]) for kind in (RETNETS, TRANSFORMERS))
        if ours and theirs:
            best, other = ours[0], theirs[0]
            ratio = seconds[other] / seconds[best]
            return (
                f"- Batch {batch}, context {row['context']:,}: the fastest RetNet ({models.NAMES[best]}: "
                f"{duration(seconds[best])} a step) is {ratio:.1f} times as fast as the fastest Transformer "
                f"({models.NAMES[other]}: {duration(seconds[other])})."
            )
    return None


def plot(result: dict[str, Any], path: str | Path, *, title: str) -> None:
    """Writes a PNG as Figure 6 of the paper: memory and throughput by context at the largest batch, latency by batch.

    A single context or batch has no panel of its own. With one of both, the panels rank memory and latency.
    """
    rows = result["rows"]
    most, contexts = max(row["batch"] for row in rows), sorted({row["context"] for row in rows})
    at = min(contexts, key=lambda c: abs(c - LATENCY_AT))
    by_context = [(row["context"], row["models"]) for row in rows if row["batch"] == most]
    by_batch = [(row["batch"], row["models"]) for row in rows if row["context"] == at]
    memory = (by_context, "memory_bytes", f"memory at batch {most} (GB)", "context", 1e9)
    throughput = (by_context, "tokens_per_second", f"tokens/s at batch {most}", "context", 1)
    latency = (by_batch, "seconds", f"one step at context {tokens(at)} (ms)", "batch", 1e-3)
    panels = [memory, throughput] * (len(contexts) > 1) + [latency] * (len(by_batch) > 1) or [memory, latency]
    figure, axes = grid(title, 1, len(panels), size=(4.8, 4.0))
    names = models.shown(list(result["parameters"]), by_context[-1][1], result)
    for axis, (points, key, label, along, unit) in zip(axes[0], panels, strict=True):
        panel(axis, points, names, key, label, along, unit=unit, looks=models.LOOKS)
    legend(figure, axes)
    figure.savefig(path, dpi=120, format="png")
