"""Draws docs/front.png, the picture of the front page, from results/: `python docs/picture.py` (extra `plot`)."""

import matplotlib.pyplot as plt
from blocks import ROOT, TWINS, ZEN4, native

CURVES = {
    "RetNet, C engine": ("native-int4", "C0", "o-"),
    "Transformer twin, C engine": ("native-twin-int4", "C3", "^-"),
    "Transformer twin, llama.cpp": ("llamacpp-q4_0", "C1", "s--"),
}
CONTEXTS = (2048, 8192, 32768)


def main() -> None:
    figure, (memory, speed) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for label, (name, colour, line) in CURVES.items():
        models = [native(TWINS, context, machine=ZEN4)[name] for context in CONTEXTS]
        memory.plot(CONTEXTS, [model["state_bytes"] / 1e6 for model in models], line, color=colour, label=label)
        speed.plot(CONTEXTS, [1000 * model["seconds"] for model in models], line, color=colour, label=label)
    for axes, title in ((memory, "memory of a sequence (MB)"), (speed, "time per token (ms)")):
        axes.set(xscale="log", title=title, xlabel="context (tokens)", ylim=(0, None))
        axes.set_xticks(CONTEXTS, labels=["2k", "8k", "32k"], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    memory.legend(fontsize=9)
    figure.savefig(ROOT / "docs" / "front.png", dpi=120)


if __name__ == "__main__":
    main()
