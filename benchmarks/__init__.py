"""Measurements that this project's authors run: `python -m benchmarks NAME`, from the root of the repository.

Each module has the shape of `retentive.bench`. Results are kept in results/ and shown by `retentive report`.
"""

BENCHES = {
    "memory": "benchmarks.memory",
    "run": "benchmarks.training_run",
    "retention": "benchmarks.retention",
    "step": "benchmarks.step",
    "prompting": "benchmarks.prompting",
    "recall": "benchmarks.recall",
    "replies": "benchmarks.replies",
    "edge": "benchmarks.edge",
    "activations": "benchmarks.activations",
    "quantization": "benchmarks.quantization",
    "ask": "benchmarks.memory_file",
    "questions": "benchmarks.questions",
    "sound": "benchmarks.sound",
    "grid": "benchmarks.grid",
    "speculation": "benchmarks.speculation",
    "scoring": "benchmarks.scoring",
    "soak": "benchmarks.soak",
    "slots": "benchmarks.slots",
    "students": "benchmarks.students",
    "state-precision": "benchmarks.state_precision",
    "gpu": "benchmarks.gpu",
}
"""The module of each name, imported when its benchmark runs."""
