"""Benches: how fast our code is on this machine, beside the alternative: interleaved, behind a correctness gate.

Every module has the same shape, so that one verb serves them all:

    Options                      a frozen dataclass, a line of text under each field: the command line's flags
    measure(options, say)        a dictionary that is JSON; `say` is called with lines of progress
    table(result)                Markdown
    PICTURE                      the title of the picture, with keys of the result in braces; None without a picture
    plot(result, path, title=)   a PNG; ModuleNotFoundError without matplotlib (extra `plot`)

`run.keep` writes what `measure` returned.
"""

BENCHES = {
    "train": "retentive.bench.training",
    "prefill": "retentive.bench.prefill",
    "decode": "retentive.bench.decode",
    "serving": "retentive.bench.serving",
}
"""The module of each name, imported when its bench runs."""
