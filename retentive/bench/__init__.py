"""Benches: speed of our code beside the alternatives on this machine, interleaved, after a correctness gate.

All modules have the same shape, so that one verb serves them all:

    Options                      frozen dataclass with a line of text under each field: flags of the command line
    measure(options, say)        result, a dictionary for JSON; calls `say` with lines of progress
    table(result)                Markdown
    PICTURE                      title of the picture, with keys of the result in braces; None without a picture
    plot(result, path, title=)   a PNG; ModuleNotFoundError without matplotlib (extra `plot`)

`run.keep` writes the result of `measure`.
"""

BENCHES = {
    "train": "retentive.bench.training",
    "prefill": "retentive.bench.prefill",
    "decode": "retentive.bench.decode",
    "serving": "retentive.bench.serving",
}
"""Module of each bench, imported when it runs."""
