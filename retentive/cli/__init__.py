"""`retentive VERB …`: a table of verbs, each in a module of its own that is imported only when it is called."""

import importlib
import io
import logging
import os
import sys
from collections.abc import Callable

from retentive import __version__
from retentive.cli.errors import one_line
from retentive.cli.progress import say
from retentive.threads import bound_spinning

VERBS = {
    "demo": ("retentive.cli.demo", "train a RetNet on this machine's Python library and see what it can do"),
    "data": ("retentive.cli.data", "turn text into packed tokens to train on"),
    "train": ("retentive.cli.train", "train a RetNet, or its Transformer twin, on packed tokens"),
    "sft": ("retentive.cli.sft", "teach a model to answer, by conversations"),
    "generate": ("retentive.cli.generate", "let a model write"),
    "memory": ("retentive.cli.memory", "read documents into a file of constant size, ask it, merge several"),
    "chat": ("retentive.cli.chat", "talk with a model in the terminal"),
    "serve": ("retentive.cli.serve", "a model behind OpenAI's HTTP API, and a page to talk with it"),
    "bench": ("retentive.cli.bench", "measure training speed, memory and decoding on this machine"),
    "eval": ("retentive.cli.eval", "score a model on the tasks of the field"),
    "compare": ("retentive.cli.compare", "train several models on the same tokens and say how they compare"),
    "report": ("retentive.cli.report", "all results of a folder as one page, the paper's tables beside them"),
    "info": ("retentive.cli.info", "what a model, a run or a size is made of and what it costs"),
    "quantize": ("retentive.cli.quantize", "a model folder of 8-bit or 4-bit weights"),
    "export": ("retentive.cli.export", "a model for another runtime: ONNX, C sources, a web page"),
    "convert": ("retentive.cli.convert", "model folders between our layout, torchscale's and fla's"),
}
"""Verb: its module, whose `main(argv)` runs it, and a line of help. So `retentive --help` imports no torch."""


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
    """Makes standard streams usable: closed ones (`<&-`) become the null device; what a locale cannot write, "?".

    Python has None for a closed stream, on which every print would fail.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (for as long as the process lives)
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
    """Print the usage or the version, or call the verb's own main."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
    elif argv[0] in ("-V", "--version"):
        print(f"retentive {__version__}")
    elif argv[0] == "generate" and len(argv) > 1 and argv[1].endswith(".onnx"):
        importlib.import_module("retentive.cli.generate_exported").main(argv[1:])  # it needs no torch
    elif argv[0] in VERBS:
        prepare()
        importlib.import_module(VERBS[argv[0]][0]).main(argv[1:])
    else:
        raise ValueError(f"unknown verb {argv[0]!r}, expected one of {', '.join(VERBS)} (retentive --help)")


def prepare() -> None:
    """Set up threads, memory and the log, before anything imports torch."""
    bound_spinning()  # read by OpenMP when torch loads it
    from retentive import machine

    machine.keep_freed_memory()
    show_log()


def usage() -> str:
    """The list of verbs."""
    lines = ["usage: retentive VERB [OPTIONS]    (retentive VERB --help tells each verb's options)", ""]
    lines += [f"  {verb:<9} {text}" for verb, (_, text) in VERBS.items()]
    return "\n".join(lines)
