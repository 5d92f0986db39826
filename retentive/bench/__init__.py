"""Benches: how fast our code is on this machine, beside the alternative: interleaved, behind a correctness gate.

Every module has the same shape, so that one verb and the report serve them all:

    Options                      a frozen dataclass, a line of text under each field: the command line's flags
    measure(options, say)        a dictionary that is JSON; `say` is called with lines of progress
    table(result)                Markdown
    plot(result, path, title=)   a PNG, where PICTURE, its title with the options' fields in braces, is not None;
                                 ModuleNotFoundError without matplotlib (extra `plot`)
"""

BENCHES = {
    "train": "retentive.bench.training",
    "prefill": "retentive.bench.prefill",
    "decode": "retentive.bench.decode",
    "memory": "retentive.bench.memory",
    "serving": "retentive.bench.serving",
}
"""The module of each name, imported when its bench runs."""
