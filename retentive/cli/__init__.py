"""`retentive VERB …`: one table of verbs, each in a module of its own that is imported when it is called."""

import importlib
import os
import sys

VERBS = {
    "demo": ("retentive.cli.demo", "train a RetNet on this machine's Python library and see what it can do"),
    "data": ("retentive.cli.data", "turn text into packed tokens to train on"),
    "train": ("retentive.cli.train", "train a RetNet, or its Transformer twin, on packed tokens"),
    "generate": ("retentive.cli.generate", "let a model write"),
    "bench": ("retentive.cli.bench", "measure training speed, memory and decoding on this machine"),
    "info": ("retentive.cli.info", "what a model, a run or a size is made of and what it costs"),
    "convert": ("retentive.cli.convert", "model folders between our layout, torchscale's and fla's"),
}


def main(argv: list[str] | None = None) -> None:
    """Run one verb. Bad input ends in one line on stderr and exit code 2 (RETENTIVE_DEBUG=1: in a traceback)."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return
    if argv[0] in ("-V", "--version"):
        from retentive import __version__

        print(f"retentive {__version__}")
        return
    verb, *rest = argv
    if verb not in VERBS:
        fail(f"unknown verb {verb!r}, expected one of {', '.join(VERBS)} (retentive --help)")
    try:
        importlib.import_module(VERBS[verb][0]).main(rest)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ArithmeticError, ModuleNotFoundError) as error:
        if os.environ.get("RETENTIVE_DEBUG"):
            raise
        fail(" ".join(str(error).split()))


def usage() -> str:
    lines = ["usage: retentive VERB [OPTIONS]    (retentive VERB --help tells each verb's options)", ""]
    lines += [f"  {verb:<9} {text}" for verb, (_, text) in VERBS.items()]
    return "\n".join(lines)


def fail(message: str) -> None:
    """Say what is wrong and leave with exit code 2, what argument parsers use for bad input."""
    print(f"retentive: {message}", file=sys.stderr)
    sys.exit(2)
