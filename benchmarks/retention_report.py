"""Tables and picture of the measurements of `bench retention`."""

from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from retentive.bench.lab import plot as pictures
from retentive.bench.lab.plot import GREY, grid, legend, panel, tokens
from retentive.tables import duration, markdown, span

NAMES = {"retentive": "retentive", "blocked": "blocked", "torchscale": "torchscale", "sdpa": "SDPA", "fla": "fla"}
LOOKS = dict(zip(NAMES, pictures.LOOKS, strict=False)) | {"limit": GREY}

DISTURBED = 0.15
"""Relative difference of the GEMM rate before and after a row: beyond it, something else must have used the machine."""


def table(result: dict[str, Any]) -> str:
    """Markdown tables: a line per row with every ratio, growth of time and memory with T, dtypes, the machine."""
    parts = [_rows(result), _growth(result["rows"]), _dtypes(result["rows"]), _notes(result)]
    return "\n\n".join(part for part in parts if part)


def _rows(result: dict[str, Any]) -> str:
    # rivals that could not run have a column too, with the reason in place of times
    absent = [name for name in result["rivals"] if name not in result["rows"][0]["contestants"]]
    others = [name for name in result["rows"][0]["contestants"] if name != "retentive"]
    heads = ["shape", "T", "inputs", "retentive", "forward", "of the limit"]
    heads += [f"{NAMES[n]}: time" for n in others + absent] + ["memory", "of q, k, v, o"]
    heads += [f"{NAMES[n]}: memory" for n in others]
    lines = []
    for row in result["rows"]:
        of = row["contestants"]
        ours = of["retentive"]
        cells = [f"{row['shape']} ({row['H']} x {row['K']}/{row['V']})", f"{row['T']:,}", row["dtype"]]
        if "seconds" in ours:
            cells += [
                f"{duration(ours['seconds'])} ({ours['backend']})",
                duration(ours["forward_seconds"]),
                f"{ours['fraction']:.0%}",
            ]
        else:
            cells += [ours["skipped"], "", ""]
        cells += [_ratio(of[n], ours, "seconds") for n in others]
        cells += [result["rivals"][n] for n in absent]
        if "seconds" in ours:
            cells += [decimal(ours["peak_bytes"]), f"{ours['peak_bytes'] / row['qkvo_bytes']:.2f}"]
        else:
            cells += ["", ""]
        cells += [_ratio(of[n], ours, "peak_bytes") for n in others]
        lines.append(cells)
    return markdown(heads, lines)


def _ratio(rival: dict[str, Any], ours: dict[str, Any], key: str) -> str:
    """Text such as `2.9x (C=128)`; the rival's own number if ours is missing, the reason if the rival's is."""
    if "skipped" in rival:
        return rival["skipped"]
    if key not in ours:
        return duration(rival[key]) if key == "seconds" else decimal(rival[key])
    chunk = f" (C={rival['chunk']})" if "seconds_by_chunk" in rival and key == "seconds" else ""
    return f"{rival[key] / ours[key]:.2f}x{chunk}"


def _apart(before: dict[str, float], after: dict[str, float]) -> float:
    return abs(before["gemm"] / after["gemm"] - 1)


def _growth(rows: list[dict[str, Any]]) -> str:
    """Table of the growth of time and memory from each length to the next, as factors."""
    lines: list[list[str]] = []
    names = list(rows[0]["contestants"])
    for a, b in _neighbours(rows):
        cells = [a["shape"], a["dtype"], f"{tokens(a['T'])} to {tokens(b['T'])}: {b['T'] / a['T']:.3g}x"]
        for name in names:
            x, y = (row["contestants"][name] for row in (a, b))
            both = "seconds" in x and "seconds" in y
            cells.append(
                f"{y['seconds'] / x['seconds']:.1f}x, {y['peak_bytes'] / x['peak_bytes']:.1f}x" if both else "–"
            )
        lines.append(cells)
    return markdown(["shape", "inputs", "tokens", *(f"{NAMES[n]}: time, memory" for n in names)], lines)


def _neighbours(rows: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Pairs of rows that differ by their length only, the shorter one first."""
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
    # groupby takes neighbours together: rows come shape by shape and dtype by dtype
    for _, same in groupby(rows, lambda row: (row["shape"], row["dtype"])):
        ordered = sorted(same, key=lambda row: row["T"])
        pairs += pairwise(ordered)
    return pairs


def _dtypes(rows: list[dict[str, Any]]) -> str:
    """Table of the speed of 16-bit inputs relative to float32."""
    # of the same shape and length: only the dtype may differ
    wide = {(row["shape"], row["T"]): row for row in rows if row["dtype"] == "fp32"}
    lines = []
    for row in rows:
        other = wide.get((row["shape"], row["T"]))
        if row["dtype"] == "fp32" or other is None:
            continue
        cells = [row["shape"], f"{row['T']:,}", row["dtype"]]
        for name, result in row["contestants"].items():
            full = other["contestants"].get(name, {})
            both = "seconds" in result and "seconds" in full
            cells.append(f"{full['seconds'] / result['seconds']:.2f}x faster than fp32" if both else "–")
        lines.append(cells)
    return markdown(["shape", "T", "inputs", *(NAMES[n] for n in rows[0]["contestants"])], lines)


def _notes(result: dict[str, Any]) -> str:
    lines = [
        "Times are of forward and backward; the columns of others are multiples of ours. Memory is what both passes "
        "hold beyond q, k, v and the gradient of o.",
        "The limit is the slower of the counted FLOPs at the GEMM rate of torch and the bytes of q, k, v, o and their "
        "gradients at the rate of reading (retentive/bench/lab/roofline.py).",
    ]
    for dtype, same in groupby(sorted(result["rows"], key=lambda row: row["dtype"]), lambda row: row["dtype"]):
        rates = [rate for row in same for rate in row["machine"].values()]
        gemm, read = ([rate[key] / 1e9 for rate in rates] for key in ("gemm", "read"))
        lines.append(
            f"This machine meanwhile: {dtype} GEMM {span(gemm)} GFLOP/s, reading {span(read)} GB/s "
            f"({result['hardware']['cpu'] if result['device'] == 'cpu' else result['hardware']['gpu']})."
        )
    # reported, not corrected: it is unknown which rows the other work has slowed down
    if any(_apart(*row["machine"].values()) > DISTURBED for row in result["rows"]):
        lines.append(
            "The machine did other work too: its GEMM rate before and after some rows differs, and so do they."
        )
    # a reader would take it for a mistake of the measurement
    if any(one.get("fraction", 0) > 1 for row in result["rows"] for one in row["contestants"].values()):
        lines.append(
            "Above 100%: torch's GEMM does not use this machine's widest vectors, and a kernel that does passes it."
        )
    if result.get("no_compiled_kernel"):
        lines.append(f"Without our compiled kernel: {result['no_compiled_kernel']}")
    lines += [f"{NAMES[name]}: {why}." for name, why in result["rivals"].items()]
    return "\n".join(f"- {text}" for text in lines)


def plot(result: dict[str, Any], path: str | Path, *, title: str) -> None:
    """A PNG, a column for each shape and dtype: time, memory and fraction of the limit against T."""
    columns = list(dict.fromkeys((row["shape"], row["dtype"]) for row in result["rows"]))
    figure, axes = grid(title, 3, len(columns), size=(4.4, 3.4))
    for (time, memory, fraction), column in zip(axes.T, columns, strict=True):
        rows = [row for row in result["rows"] if (row["shape"], row["dtype"]) == column]
        first = rows[0]
        shape = "B = {}, {} heads, K = {}, V = {}".format(*(first[n] for n in "BHKV"))
        time.set_title(f"{', '.join(column)}\n{shape}", fontsize=9)
        # lower bound of memory: the inputs and outputs of a pass
        bounds = [{"seconds": row["limit"]["seconds"], "peak_bytes": row["qkvo_bytes"]} for row in rows]
        points = [(row["T"], row["contestants"] | {"limit": bound}) for row, bound in zip(rows, bounds, strict=True)]
        names = {name: NAMES[name] for name in first["contestants"]} | {"limit": "limit; size of q, k, v, o"}
        panel(time, points, names, "seconds", "forward + backward (ms)", "tokens", unit=1e-3, looks=LOOKS)
        panel(memory, points, names, "peak_bytes", "memory (MB)", "tokens", unit=1e6, looks=LOOKS)
        panel(fraction, points, names, "fraction", "of the limit", "tokens", percent=True, looks=LOOKS)
    legend(figure, axes)
    figure.savefig(path, dpi=120, format="png")
