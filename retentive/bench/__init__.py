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
    "run": "retentive.studies.training_run",
    "retention": "retentive.bench.retention",
    "step": "retentive.bench.step",
    "prompting": "retentive.studies.prompting",
    "recall": "retentive.studies.recall",
    "replies": "retentive.studies.replies",
    "edge": "retentive.studies.edge",
    "activations": "retentive.studies.activations",
    "quantization": "retentive.studies.quantization",
    "ask": "retentive.bench.memory_file",
    "questions": "retentive.bench.questions",
    "sound": "retentive.bench.sound",
    "grid": "retentive.bench.grid",
    "serving": "retentive.bench.serving",
    "speculation": "retentive.bench.speculation",
    "scoring": "retentive.bench.scoring",
    "soak": "retentive.bench.soak",
}
"""The module of each name, imported when its bench runs. Studies have the same shape; they are named here and not
imported, since their floor is above this one."""
