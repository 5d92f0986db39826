"""`retentive VERB …`: a table of verbs. Each has its own module, imported only when the verb is called."""

import difflib
import importlib
import io
import logging
import os
import sys
from collections.abc import Callable

from retentive import __version__
from retentive.cli.errors import TRAINING, one_line
from retentive.cli.progress import say
from retentive.threads import bound_spinning

VERBS = {
    "demo": ("retentive.cli.demo", "train a small RetNet on Python's own source and see what it can do"),
    "data": ("retentive.cli.data", "pack text into tokens to train on"),
    "train": ("retentive.cli.train", "train a RetNet, or its Transformer twin, on packed tokens"),
    "sft": ("retentive.cli.sft", "teach a model to answer, by conversations"),
    "linearize": ("retentive.cli.linearize", "turn a Transformer into a RetNet, which learns its predictions"),
    "generate": ("retentive.cli.generate", "generate text from a prompt"),
    "memory": ("retentive.cli.memory", "read documents into a memory file of constant size; ask it, merge several"),
    "chat": ("retentive.cli.chat", "talk with a model in the terminal"),
    "serve": ("retentive.cli.serve", "serve a model by OpenAI's HTTP API, with a chat page"),
    "bench": ("retentive.cli.bench", "measure training, prefill, decoding and serving on this machine"),
    "eval": ("retentive.cli.eval", "score a model on standard tasks"),
    "compare": ("retentive.cli.compare", "train several models on the same tokens and compare them"),
    "report": ("retentive.cli.report", "build one page from all results in a folder, beside the paper's tables"),
    "info": ("retentive.cli.info", "show the architecture and the costs of a model, a run or a size"),
    "quantize": ("retentive.cli.quantize", "write a model folder with 8-bit or 4-bit weights"),
    "export": (
        "retentive.cli.export",
        "export a model for another runtime: GGUF, ONNX, C sources, a web page, transformers",
    ),
    "convert": (
        "retentive.cli.convert",
        "convert model folders between our layout, torchscale's, fla's and Llama's",
    ),
    "completion": ("retentive.cli.completion", "print a script that completes commands and options: bash, zsh or fish"),
}
"""Module of each verb, whose `main(argv)` runs it, and a line of help. `retentive --help` imports no torch."""
ALIASES = {
    "--learning-rate": "--lr",
    "--batch-size": "--batch",
    "--max-steps": "--steps",
    "--warmup-steps": "--warmup",
    "--max-length": "--length",
    "--grad-clip": "--clip",
    "--gradient-accumulation-steps": "--accumulate",
}
"""Other tools' names of options, for verbs that train."""


def main(argv: list[str] | None = None, program: Callable[[list[str]], None] | None = None) -> None:
    """Run one verb. Bad input ends in one line on stderr and exit code 2 (RETENTIVE_DEBUG=1: in a traceback).

    Args:
        program: called with `argv` instead of `run`, for another program with the same manners.
    """
    argv = sys.argv[1:] if argv is None else argv
    mend_streams()
    with one_line(argv[0] if argv else ""):
        (program or run)(argv)


def mend_streams() -> None:
    """Make standard streams usable: closed ones (`<&-`) become the null device, unencodable characters become "?".

    Python sets a closed stream to None, and every print would fail.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (open until the process ends)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


class Shown(logging.Handler):
    """Log handler that writes records to stderr, with options as they are typed."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


def show_log() -> None:
    """Show the package's warnings on stderr; at a terminal also what it does, since a user waits for a compiler."""
    log, handler = logging.getLogger("retentive"), Shown()
    handler.setFormatter(logging.Formatter("retentive: %(message)s"))
    log.handlers = [handler]
    log.setLevel(logging.INFO if sys.stderr.isatty() else logging.WARNING)


def run(argv: list[str]) -> None:
    """Print the usage or the version, or call the main function of the verb."""
    if len(argv) > 1 and argv[0] == "help":
        argv = [*argv[1:], "--help"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
    elif argv[0] in ("-V", "--version", "version"):
        print(f"retentive {__version__}")
    elif argv[0] == "generate" and len(argv) > 1 and argv[1].endswith(".onnx"):
        importlib.import_module("retentive.cli.generate_exported").main(argv[1:])  # it needs no torch
    elif argv[0] in VERBS:
        prepare()
        options = argv[1:] if argv[0] not in TRAINING else [renamed(word) for word in argv[1:]]
        importlib.import_module(VERBS[argv[0]][0]).main(options)
    else:
        close = difflib.get_close_matches(argv[0], VERBS, 1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(VERBS)}"
        raise ValueError(f"unknown command {argv[0]!r}: {hint} (retentive --help)")


def renamed(word: str) -> str:
    """Return an argument with our name of its option, if it is another tool's."""
    name, equals, value = word.partition("=")
    return ALIASES.get(name.replace("_", "-"), name) + equals + value


def prepare() -> None:
    """Set up threads, memory and the log before anything imports torch."""
    bound_spinning()  # OpenMP reads it when torch loads it
    from retentive import machine

    machine.keep_freed_memory()
    show_log()


def usage() -> str:
    """Return the list of verbs with their one-line descriptions."""
    lines = ["usage: retentive COMMAND [OPTIONS]    (retentive COMMAND --help lists its options)", ""]
    lines += [f"  {verb:<10} {text}" for verb, (_, text) in VERBS.items()]
    return "\n".join(lines)
