"""Benches: what this machine does with our code, measured beside the alternative, in turns, behind a correctness gate.

Every module has the same shape, so that one verb and the report serve them all:

    Options                      a frozen dataclass, a line of text under each field: the command line's flags
    measure(options, say)        a dictionary that is JSON, `say` called with a line now and then
    table(result)                Markdown
    plot(result, path, title=)   a PNG, where PICTURE, its title with the options' fields in braces, is not None;
                                 ModuleNotFoundError without matplotlib (extra `plot`)
"""

BENCHES = {
    "train": "retentive.bench.training",
    "prefill": "retentive.bench.prefill",
    "decode": "retentive.bench.decode",
    "memory": "retentive.bench.memory",
    "run": "retentive.studies.training_run",
    "retention": "retentive.bench.retention",
    "step": "retentive.bench.step",
    "prompting": "retentive.studies.prompting",
    "recall": "retentive.studies.recall",
    "ask": "retentive.bench.memory_file",
    "serving": "retentive.bench.serving",
    "speculation": "retentive.bench.speculation",
    "scoring": "retentive.bench.scoring",
    "soak": "retentive.bench.soak",
}
"""The module of each name, imported when it is called for; studies in the same shape are among them."""
