"""Draws docs/front.png and docs/which.png from results/: `python docs/picture.py` (extra `plot`)."""

import matplotlib.pyplot as plt
from blocks import ROOT, TWINS, ZEN4, native
from blocks_results import KINDS, TEXTS, small

CURVES = {
    "RetNet, C engine": ("native-int4", "C0", "o-"),
    "twin with grouped heads, C engine": ("native-twin-int4", "C3", "^-"),
    "the same twin, llama.cpp": ("llamacpp-q4_0", "C1", "s--"),
}
CONTEXTS = (2048, 8192, 32768)


def which() -> None:
    """Bits per byte of each model on each text, with intervals."""
    figure, panels = plt.subplots(1, len(TEXTS), figsize=(10, 3), layout="constrained", sharey=True)
    for axes, (text, title) in zip(panels, TEXTS.items(), strict=True):
        found = small(text)
        for place, name in enumerate(reversed(KINDS)):
            if ("1m", name) in found:
                r = found["1m", name]
                colour = {"hybrid": "C0", "retnet": "C1"}.get(name, "C3")
                axes.errorbar(r["bits_per_byte"], place, xerr=r["half_width"], fmt="o", color=colour, capsize=3)
        axes.set(title=title, xlabel="bits per byte (lower is better)")
        axes.set_yticks(range(len(KINDS)), labels=list(reversed(KINDS.values())))
        axes.grid(alpha=0.3, axis="x")
    figure.savefig(ROOT / "docs" / "which.png", dpi=120)


def front() -> None:
    """Memory and time per token by context."""
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
    front()
    which()
