"""Blocks of docs/paper.md: the paper's RetNet (`--model retnet-paper`) in torch beside its twin."""

from typing import Any

from blocks import EPYC, XEON, best, perplexities, result, row, size, table, thousands, times, train_ratio


def decoding(context: int, batch: int) -> dict[str, Any]:
    """Models of the decoding file at one context and batch."""
    return row(result("decode-130m", XEON)["rows"], context=context, batch=batch)["models"]


def paper_claims() -> str:
    """The paper's claims and what was measured here, each against a Transformer."""
    many, one = decoding(8192, 8), decoding(8192, 1)
    trained = row(result("train-130m", XEON)["rows"], length=8192)
    memory = many["transformer"]["memory_bytes"] / many["retnet"]["memory_bytes"]
    latency = one["transformer"]["seconds"] / one["retnet"]["seconds"]
    speed = many["retnet"]["tokens_per_second"] / many["transformer"]["tokens_per_second"]
    found = best("compare-sizes")
    bits = [[found[n, v]["bits_per_byte"] for v in ("retnet-paper", "transformer")] for n in ("1m", "2m", "5m")]
    behind = max(ours / theirs - 1 for ours, theirs in bits)
    lines = [
        f"decoding throughput at 8k tokens | 8.4 times (6.7B) | {times(speed)} times (130 M, batch 8)",
        f"decoding memory at 8k tokens | 3.4 times less (6.7B) | {times(memory)} times less (130 M, batch 8)",
        f"decoding latency at 8k tokens | 15.6 times lower (6.7B) | {times(latency)} times lower (130 M, batch 1)",
        f"training throughput on rows of 8,192 tokens | 1.1 times (1.3B) | {times(train_ratio(trained))} times (130 M)",
        f"quality after the same tokens | better from 2.7B on | up to {100 * behind:.1f} % worse (1.5 M to 6.0 M)",
    ]
    return table("against a Transformer | the paper | measured here", *lines)


def inference() -> str:
    """Figures of RetNet, and those of its rivals as multiples of them."""

    def line(text: str, models: dict[str, Any], ours: str, key: str = "tokens_per_second") -> str:
        cells = [text, ours]
        for name in ("transformer", "grouped", "llama"):
            ratio = models[name][key] / models["retnet"][key] if name in models else 0.0
            if key == "tokens_per_second" and ratio:
                cells.append("as fast" if times(ratio) == "1.0" else f"{times(1 / ratio)} times slower")
            else:
                cells.append(f"{times(ratio)} times" if ratio else "")
        return " | ".join(cells)

    def speed(models: dict[str, Any]) -> str:
        return f"{models['retnet']['tokens_per_second']:,.0f} tokens/s"

    far, near = decoding(32768, 8), decoding(2048, 1)
    lines = [
        line("decoding after 32,768 tokens, 8 sequences", far, speed(far)),
        line("memory of that, with the weights", far, size(far["retnet"]["memory_bytes"]), "memory_bytes"),
        line("decoding after 2,048 tokens, one sequence", near, speed(near)),
    ]
    for n in (8192, 32768):
        models = row(result("prefill-130m", XEON)["rows"], length=n)["models"]
        lines.append(line(f"prefill of {n:,} tokens", models, speed(models)))
    return table(" | RetNet | twin | twin, grouped heads | Llama of transformers", *lines)


def inference_limits() -> str:
    """Contexts from which RetNet needs less memory, and the fraction of the memory bandwidth that its step reaches."""
    even, rows = result("decode-130m", XEON)["break_even"], result("decode-130m", XEON)["rows"]
    reached = [r["models"]["retnet"]["fraction"] for r in rows]
    lines = [
        f"RetNet needs less memory than the twin above | {even['transformer']:,} tokens",
        f"RetNet needs less memory than grouped heads above | {even['grouped']:,} tokens",
        f"memory bandwidth that RetNet's step reaches, at least | {100 * min(reached):.0f} %",
        f"memory bandwidth that RetNet's step reaches, at most | {100 * max(reached):.0f} %",
    ]
    return table("limit | value", *lines)


def one_sequence() -> str:
    """Memory and time per token of a small model by context."""
    ours, theirs = "RetNet", "Transformer twin"
    lines = [
        f"{n:,} | {size(r[ours]['bytes'])} | {size(r[theirs]['bytes'])} | {r[ours]['ms_per_token']:.1f} | "
        f"{r[theirs]['ms_per_token']:.1f}"
        for n in (512, 2048, 16384)
        for r in [row(result("memory", EPYC)["rows"], context=n)]
    ]
    return table("context | RetNet: memory | twin: memory | RetNet: ms/token | twin: ms/token", *lines)


def training() -> str:
    """Speed and memory of a training step, 130 M parameters."""
    lines = []
    for r in result("train-130m", XEON)["rows"]:
        ours, theirs = r["retnet"], r["transformer"]
        speeds = [f"{model['tokens_per_second']:,.0f} tokens/s" for model in (ours, theirs)]
        memory = [size(model["peak_bytes"]) for model in (ours, theirs)]
        lines.append(" | ".join([f"{r['length']:,}", *speeds, f"{train_ratio(r):.1f}", *memory]))
    return table("length of a row | RetNet | twin | ratio | RetNet: memory | twin: memory", *lines)


def training_small() -> str:
    """Speed of a training step, 6.0 M parameters."""
    lines = [
        f"{r['length']:,} | {thousands(r['retnet']['tokens_per_second'])} tokens/s | "
        f"{thousands(r['transformer']['tokens_per_second'])} tokens/s | {train_ratio(r):.1f}"
        for r in result("train-step", EPYC)["rows"]
    ]
    return table("length of a row | RetNet | twin | ratio", *lines)


def quality() -> str:
    """Held-out bits per byte and training speed by size."""
    found, lines = best("compare-sizes"), []
    for n in ("1m", "2m", "5m"):
        ours, theirs = found[n, "retnet-paper"], found[n, "transformer"]
        lines.append(
            f"{ours['parameters'] / 1e6:.1f} M | {ours['bits_per_byte']:.3f} ± {ours['half_width']:.3f} | "
            f"{theirs['bits_per_byte']:.3f} ± {theirs['half_width']:.3f} | {-theirs['difference']:.3f} ± "
            f"{theirs['difference_half_width']:.3f} | {thousands(ours['tokens_per_second'])} | "
            f"{thousands(theirs['tokens_per_second'])}"
        )
    return table("parameters | RetNet | twin | difference | RetNet: tokens/s of training | twin: tokens/s", *lines)


def contexts() -> str:
    """Perplexity of the same last tokens, by length of context."""
    ours, theirs = perplexities("retnet"), perplexities("transformer")
    lines = [f"{n:,} | {ours[n]:.1f} | {theirs[n]:.1f}" for n in ours]
    return table("context, perplexity | RetNet | twin", *lines)


def ablations() -> str:
    """What each part of the paper's RetNet is worth."""
    names = {
        "no-gate": "without the gate",
        "no-decay": "without decay: linear attention",
        "one-decay": "one decay for all heads",
        "small-heads": "small heads",
        "short-head": "a first head that forgets at once",
        "paper-decay": "the decays of the paper's equation 8",
        "no-score-norm": "without the row norm",
        "hybrid": "one block of attention",
        "gated": "a decay computed from the token",
        "no-head-norm": "without head norms",
    }
    rows = {r["variant"]: r for r in result("compare-ablations", EPYC)["rows"]}
    lines = [
        f"{text} | {rows[name]['difference']:+.3f} ± {rows[name]['difference_half_width']:.3f}"
        for name, text in sorted(names.items(), key=lambda pair: -rows[pair[0]]["difference"])
    ]
    return table("variant | bits per byte, against `retnet-paper`", *lines)
