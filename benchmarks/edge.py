"""`python -m benchmarks edge`: one model in every exported form, each measured in a process of its own.

For each form: file size, time to first token, prefill and decoding throughput, and peak memory. The time to first token
counts from the start of the process, including Python, and torch if imported. Processes run in rounds, one after the
other. Throughput is the best of the rounds, the other numbers are medians. The correctness gate: forms that compute in
floats must give torch's logits, or nothing is shown. Quantised forms were checked against the model when exported.

Each process runs `edge_form.py`, which imports only what its form needs. `edge_form.c` is for C without Python, and
`edge_browser.py` for Chromium, where the time to first token counts from the opening of the page.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.filesize import decimal

from benchmarks.edge_browser import find_browser
from benchmarks.edge_form import PROMPT
from retentive import machine
from retentive.bench.lab import llamacpp, models
from retentive.bench.lab.options import Say, Sized, silent, words
from retentive.checkpoint import save_model
from retentive.checkpoint.quantize import BITS, quantize
from retentive.data.tokenizer import ByteTokenizer
from retentive.export.browser import write_page
from retentive.export.folder import FILES, to_onnx
from retentive.models import build
from retentive.native.library import FOLDER, OPS
from retentive.ops.compiler import FLAGS, LINK, NotBuilt, find_compiler, instruction_flag
from retentive.ops.compiler import run as run_compiler
from retentive.options import at_least_one, known
from retentive.tables import duration, markdown


class Form(NamedTuple):
    """An exported form of the model and its runtime."""

    label: str
    kind: str
    weights: str = "stored"
    needs: tuple[str, ...] = ()
    """Packages that the form requires."""


FORMS = {
    "torch": Form("torch, float32", "torch"),
    "native": Form("C, float32", "native"),
    "native-int8": Form("C, int8", "native", "int8"),
    "native-int4": Form("C, int4", "native", "int4"),
    "c": Form("C without Python, float32", "c"),
    "c-int8": Form("C without Python, int8", "c", "int8"),
    "c-int4": Form("C without Python, int4", "c", "int4"),
    "browser": Form("Chromium, float32", "browser", needs=("ziglang", "playwright")),
    "browser-int8": Form("Chromium, int8", "browser", "int8", ("ziglang", "playwright")),
    "browser-int4": Form("Chromium, int4", "browser", "int4", ("ziglang", "playwright")),
    "onnx": Form("ONNX, float32", "onnx", needs=("onnx", "onnxruntime")),
    "onnx-int8": Form("ONNX, int8", "onnx", "int8", ("onnx", "onnxruntime")),
    "onnx-int4": Form("ONNX, int4", "onnx", "int4", ("onnx", "onnxruntime")),
    "llamacpp-q8_0": Form("Transformer twin, llama.cpp Q8_0", "llamacpp", "Q8_0", ("llama_cpp", "gguf")),
    "llamacpp-q4_0": Form("Transformer twin, llama.cpp Q4_0", "llamacpp", "Q4_0", ("llama_cpp", "gguf")),
}
REMOVED = {
    "genai": "onnxruntime-genai, float32",
    "genai-int4": "onnxruntime-genai, int4",
    "executorch": "ExecuTorch, float32",
    "executorch-int8": "ExecuTorch, int8",
    "executorch-int4": "ExecuTorch, int4",
}
"""Labels of forms of version 0.1.0, which committed results hold."""
PROGRAM = [
    *(flag for flag in FLAGS if flag != "-fPIC"),
    *(f"-I{FOLDER}", f"-I{OPS}"),
    *(str(file) for file in (FOLDER / "retentive.c", Path(__file__).with_name("edge_form.c"))),
]
TOLERANCE = 1e-3
"""Largest difference from torch's logits, relative to their size, for forms that compute in floats."""
PICTURE = None


@dataclass(frozen=True, kw_only=True)
class Options(Sized):
    """One model in each exported form: file size, time to first token, prefill, decoding, memory, beside llama.cpp."""

    forms: tuple[str, ...] = tuple(FORMS)
    """torch; native, c, browser and onnx, each also with -int8 and -int4; llamacpp-q8_0, llamacpp-q4_0. Forms whose
    packages are not installed are left out."""
    tokens: int = 512
    """Tokens of the text for timing prefill."""
    steps: int = 64
    """Tokens decoded in a repetition."""
    repeats: int = 3
    """Rounds of processes."""
    threads: int = 2
    """Threads of each form."""


def measure(options: Options, say: Say = silent) -> dict[str, Any]:
    """A row per form.

    Raises:
        ValueError: an unknown form or size, forms without torch, or numbers below 1.
        ArithmeticError: a form gives different logits than torch.
        ChildProcessError: a form's process failed; has the last line of its error.
    """
    at_least_one(options, "tokens", "steps", "repeats", "threads")
    asked = words(options.forms)
    known(asked, FORMS, "form")
    if "torch" not in asked:
        raise ValueError(f"torch must be among the forms, the others are held against it; got {', '.join(asked)}")
    for name in [name for name in FORMS if name in asked]:
        if absent := missing(FORMS[name]):
            say(f"without {name}: {absent} is not installed")
            asked.remove(name)
    files = dict[str, Path]()
    with tempfile.TemporaryDirectory() as folder:
        for name in [name for name in FORMS if name in asked]:
            try:
                files[name] = made(FORMS[name], options, Path(folder))
            except ValueError as error:  # an export that looks at its own logits; of torch, what it is asked for
                if name == "torch":
                    raise
                say(f"without {name}: {error}")
        names = list(files)
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for turn in range(options.repeats):
            for name in names:
                found[name].append(run(FORMS[name], files[name], options))
            say(f"round {turn + 1} of {options.repeats}")
        sizes = {name: file.stat().st_size for name, file in files.items()}
    check(found)
    rows = []
    for name in names:
        runs = found[name]
        row: dict[str, Any] = {"form": name, "file_bytes": sizes[name]}
        row |= {key: statistics.median(one[key] for one in runs) for key in ("first_seconds", "peak_bytes")}
        row |= {key: max(one[key] for one in runs) for key in ("read_per_second", "write_per_second")}
        rows.append(row)
    return {
        "what": f"one model in each form; the first token after a prompt of {PROMPT}, reading {options.tokens}",
        "size": options.size,
        "vocab_size": options.vocab_size,
        "threads": options.threads,
        "hardware": machine.describe(),
        "rows": rows,
    }


def missing(form: Form) -> str | None:
    """First requirement of a form that is not installed, or None."""
    if form.kind == "c" and not compiler():
        return "a C compiler"
    absent = [package for package in form.needs if not find_spec(package)]
    return absent[0] if absent else "Chromium" if form.kind == "browser" and not find_browser() else None


def compiler() -> list[str]:
    """The C compiler and its fixed flags; empty if no compiler is installed."""
    try:
        return find_compiler() or []
    except NotBuilt:  # CC names none
        return []


def made(form: Form, options: Options, folder: Path) -> Path:
    """Write a form's file into the folder and return it; all forms of this package have the same weights."""
    config = options.config
    place = folder / f"{form.kind}-{form.weights}"
    place.mkdir()
    if form.kind == "llamacpp":
        return llamacpp.written(models.grouped(config), form.weights, place)
    torch.manual_seed(0)
    model = build(config).eval()
    if form.kind == "onnx":
        graph = place / FILES["onnx"]
        to_onnx(model, graph, 0, form.weights, False)
        return graph
    model = model if form.weights == "stored" else quantize(model, BITS[form.weights], dtype=model.dtype)
    if form.kind == "browser":
        save_model(place / "model", model, ByteTokenizer())
        write_page(place, ByteTokenizer(), name="bench")
        return place / "model" / "model.safetensors"
    save_model(place, model, ByteTokenizer())
    if form.kind == "c":
        try:
            run_compiler(compiler(), [instruction_flag(compiler()), *PROGRAM, "-o", str(place / "edge_form"), *LINK])
        except NotBuilt as error:
            raise ChildProcessError(f"{form.label} failed: {error}") from None
    return place / "model.safetensors"


def run(form: Form, file: Path, options: Options) -> dict[str, Any]:
    """Run a form's process and return its numbers; raises ChildProcessError with the last line of its error."""
    task = {"kind": form.kind, "file": str(file), "vocab_size": options.vocab_size, "threads": options.threads}
    task |= {"tokens": options.tokens, "steps": options.steps, "began": time.time()}
    command = [sys.executable, "-m", "benchmarks.edge_form", json.dumps(task)]
    if form.kind == "c":
        numbers = (options.threads, PROMPT, options.tokens, options.steps, options.vocab_size, task["began"])
        command = [str(file.with_name("edge_form")), str(file.parent), *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ChildProcessError(f"{form.label} failed: {(done.stderr.strip() or '?').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def check(found: dict[str, list[dict[str, Any]]]) -> None:
    """Raise ArithmeticError if a form in floats gives different logits than torch."""
    want = np.array(found["torch"][0]["logits"])
    for name, runs in found.items():
        if FORMS[name].weights == "stored":
            off = float(np.abs(np.array(runs[0]["logits"]) - want).max() / np.abs(want).max())
            if not off <= TOLERANCE:
                raise ArithmeticError(f"{name} gives logits that are off by {off:.1e}, above {TOLERANCE}: not shown")


def table(result: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    labels = {name: form.label for name, form in FORMS.items()} | REMOVED
    lines = [
        [
            labels[row["form"]], decimal(row["file_bytes"]), duration(row["first_seconds"]),
            f"{row['read_per_second']:,.0f}", f"{row['write_per_second']:,.0f}", decimal(row["peak_bytes"]),
        ]
        for row in result["rows"]
    ]  # fmt: skip
    return markdown(["form", "file", "first token after", "read/s", "written/s", "memory"], lines)
