"""Blocks of docs/numbers.md and docs/native.md: this package's RetNet, its engine and its server."""

from typing import Any

from blocks import (
    EPYC,
    FULL,
    LATER,
    LONG,
    NATIVE,
    XEON,
    ZEN4,
    ZEN4_LATER,
    best,
    file,
    millions,
    native,
    result,
    row,
    size,
    table,
    thousands,
    times,
)

ENGINES = {
    "retnet": "torch, bf16",
    "native-bf16": "C, bf16",
    "native-int8": "C, int8",
    "native-int4": "C, int4",
    "llamacpp-f16": "llama.cpp F16",
    "llamacpp-q8_0": "Q8_0",
    "llamacpp-q4_0": "Q4_0",
}
"""Models of the files of the native engine, and their columns."""
VARIANTS = {
    "retnet": "RetNet",
    "transformer-qk-norm": "twin with QK-norm",
    "transformer": "twin",
    "retnet-paper": "the paper's RetNet",
}


def milliseconds(models: dict[str, Any], names: dict[str, str] = ENGINES) -> str:
    """Cells of milliseconds per token, one for each engine."""
    return " | ".join(f"{1000 * models[name]['seconds']:.1f}" for name in names)


def decode_native() -> str:
    """Time of a decoding step by context, one sequence."""
    lines = [f"{context:,} | {milliseconds(native(NATIVE, context))}" for context in (1, 2048, 8192)]
    return table("context, ms a token | " + " | ".join(ENGINES.values()), *lines)


def decode_kinds() -> str:
    """Time of a step of each kind of model in the engine, by weights and context, beside llama.cpp."""
    lines = []
    for bits, rival in (("bf16", "f16"), ("int8", "q8_0"), ("int4", "q4_0")):
        names = (f"native-{bits}", f"native-hybrid-{bits}", f"native-twin-{bits}", f"llamacpp-{rival}")
        for context in (512, 8192):
            models = native("decode-kinds-130m", context, machine=ZEN4)
            cells = " | ".join(f"{1000 * models[name]['seconds']:.1f}" for name in names)
            lines.append(f"{bits} ({rival.upper()}), {context:,} | {cells}")
    return table("weights, context, ms a token | RetNet | hybrid | twin | twin in llama.cpp", *lines)


def decode_native_bandwidth() -> str:
    """Fraction of the machine's memory bandwidth that a step reaches, without context."""
    models = native(NATIVE, 1)
    cells = " | ".join(f"{100 * models[name]['fraction']:.0f} %" for name in ENGINES)
    return table("no context | " + " | ".join(ENGINES.values()), f"of the memory bandwidth | {cells}")


def decode_native_batches() -> str:
    """Time of a decoding step by batch, without context."""
    what = "decode-native-batches-130m"
    lines = [f"{batch} | {milliseconds(native(what, 1, batch))}" for batch in (1, 8, 16)]
    return table("sequences, ms a step | " + " | ".join(ENGINES.values()), *lines)


def decode_native_long() -> str:
    """Time per token and memory at long contexts, int4, beside grouped heads and a head of keys for every query."""

    def line(context: int) -> str:
        ours = native(FULL, context)["native-int4"]
        grouped = NATIVE if context < 32768 else LONG
        rivals = [native(what, context)["llamacpp-q4_0"] for what in (grouped, FULL)]
        models = [ours, *rivals]
        cells = [f"{1000 * model['seconds']:.1f}" for model in models] + [size(m["state_bytes"]) for m in models]
        return " | ".join([f"{context:,}", *cells])

    head = "context | RetNet, ms a token | Q4_0, grouped heads | Q4_0, all heads | RetNet, memory | grouped | all heads"
    return table(head, *(line(context) for context in (2048, 8192, 32768)))


def prefill_native() -> str:
    """Speed of reading a prompt, by length."""
    kept = {name: text for name, text in ENGINES.items() if name not in ("native-int8", "llamacpp-q8_0")}
    lines = []
    for what, lengths in (("prefill-native-130m", (2048, 8192)), ("prefill-native-32k-130m", (32768,))):
        for length in lengths:
            models = row(result(what, EPYC)["rows"], length=length)["models"]
            lines.append(f"{length:,} | " + " | ".join(f"{models[name]['tokens_per_second']:,.0f}" for name in kept))
    return table("prompt, tokens/s | " + " | ".join(kept.values()), *lines)


def serving_native() -> str:
    """Speed of 16 streams through the engine."""
    found = result("serving-native-130m", EPYC)["tokens_per_second"]
    names = {"engine": "torch, bf16", "native-bf16": "C, bf16", "native-int8": "C, int8", "native-int4": "C, int4"}
    cells = " | ".join(f"{found[name]['median']:,.0f}" for name in names)
    return table(" | " + " | ".join(names.values()), f"16 streams, tokens/s in all | {cells}")


def activations() -> str:
    """Speed of the engine with activations of 8 bits, beside those of 16 and llama.cpp."""
    names = {
        "native-int8": "int8",
        "native-w8a8": "W8A8",
        "native-w4a8": "W4A8",
        "llamacpp-q8_0": "llama.cpp Q8_0",
        "llamacpp-q4_0": "Q4_0",
    }
    lines = [
        f"{batch} sequence{'s' * (batch > 1)} after 2,048 tokens, ms a step | "
        + milliseconds(native("decode-w8a8-130m", 2048, batch), names)
        for batch in (1, 8, 16)
    ]
    prompts = row(result("prefill-w8a8-130m", EPYC)["rows"], length=2048)["models"]
    cells = " | ".join(f"{prompts[name]['tokens_per_second']:,.0f}" for name in names)
    lines.append(f"prompt of 2,048 tokens, tokens/s | {cells}")
    streams = result("serving-w8a8-130m", EPYC)["tokens_per_second"]
    cells = " | ".join(f"{streams[name]['median']:,.0f}" if name in streams else "–" for name in names)
    lines.append(f"16 streams through the engine, states of 8 bits, tokens/s | {cells}")
    waits = result("serving-w8a8-130m", EPYC)["between_tokens"]
    for share, title in (("p50", "time between two tokens there, ms, p50"), ("p95", "p95")):
        cells = " | ".join(f"{1000 * waits[name][share]:.1f}" if name in waits else "–" for name in names)
        lines.append(f"{title} | {cells}")
    return table(" | " + " | ".join(names.values()), *lines)


def slots() -> str:
    """Servers with 16 slots, ours and llama.cpp's."""
    names = {"native-w8a8": "W8A8", "native-w4a8": "W4A8", "llamacpp-q8_0": "llama.cpp Q8_0", "llamacpp-q4_0": "Q4_0"}
    rows = {r["model"]: r for r in result("slots-130m", EPYC)["rows"]}
    lines = []
    for text, key, scale, form in (
        ("tokens/s while all streams decode", "decoding", 1, ",.0f"),
        ("generated tokens/s, with the time for prompts", "tokens_per_second", 1, ",.0f"),
        ("first token, s, median", "first", 1, ".1f"),
        ("time between two pieces of text, ms, p50", "p50", 1000, ".0f"),
        ("p95", "p95", 1000, ".0f"),
    ):
        lines.append(" | ".join([text, *(format(scale * rows[name][key], form) for name in names)]))
    return table(" | " + " | ".join(names.values()), *lines)


def quantization() -> str:
    """Quality loss from quantisation."""
    found = result("quantization-5m", EPYC)
    rows = {r["weights"]: r for r in found["rows"]}
    whole = rows["float32"]["bits_per_byte"]
    lines = []
    for name, r in rows.items():
        text = name + (f" on {found['calibration']:,} tokens" if "calibrated" in name else "")
        loss = f"{100 * (r['bits_per_byte'] / whole - 1):+.3f} %" if name != "float32" else ""
        same = f"{r['same_tokens']:g}" if name != "float32" else ""
        lines.append(
            f"{text} | {size(r['bytes'])} | {r['bits_per_byte']:.4f} | {loss} | {r['first']:.4f} | {r['others']:.4f} "
            f"| {same}"
        )
    head = "weights | file | bits per byte | loss | nats, first 16 tokens | nats, other tokens | same tokens of 128"
    return table(head, *lines)


def package() -> str:
    """Bits per byte of this package's RetNet beside its twins and the paper's RetNet, by size."""
    found, lines = best("compare-sizes-default"), []
    for n in ("1m", "2m", "5m"):
        cells = [f"{found[n, v]['bits_per_byte']:.3f} ± {found[n, v]['half_width']:.3f}" for v in VARIANTS]
        lines.append(" | ".join([millions(found[n, "retnet"]["parameters"]), *cells]))
    doubt = max(r["difference_half_width"] for (_, variant), r in found.items() if variant != "retnet")
    return (
        table("parameters, bits per byte | " + " | ".join(VARIANTS.values()), *lines)
        + f"\n\nA difference between two models of a size is known to ± {doubt:.3f}."
    )


def changes() -> str:
    """What each part of this package's RetNet is worth, and how far its twins are from it."""
    names = {
        "retnet-no-gate": "without the swish gate",
        "retnet-fixed": "with fixed decays",
        "retnet-head-norm": "with the paper's head norms",
        "retnet-no-rotation": "without rotation",
        "retnet-no-qk-norm": "without QK-norm",
        "retnet-scale-4": "with decays of a quarter of the scale",
        "retnet-small-heads": "with four times as many heads",
        "retnet-paper": "the paper's RetNet",
        "transformer": "twin",
        "transformer-qk-norm": "twin with QK-norm",
        "transformer-forget": "twin with a forget gate in its attention",
    }
    rows = {r["variant"]: r for r in result("compare-changes", EPYC)["rows"]}
    lines = [
        f"{text} | {rows[name]['difference']:+.3f} | ± {rows[name]['difference_half_width']:.3f}"
        for name, text in names.items()
    ]
    return table("variant | bits per byte against RetNet | 95 % interval", *lines)


def longer() -> str:
    """Bits per byte in a longer run: on the part of the held-out text that is scored meanwhile, and on all of it."""
    runs = {each["variant"]: each for each in result("compare-long-hybrid", LATER)["runs"]}
    names = {"hybrid": "hybrid", "transformer-qk-norm-forget": "twin with QK-norm and a forget gate"} | VARIANTS
    curves = {name: dict(runs[name]["curve"]) for name in names if name in runs}
    marks = list(curves["retnet"])[1::2]
    lines = [f"{millions(n)} | " + " | ".join(f"{curve[n]:.3f}" for curve in curves.values()) for n in marks]
    whole = " | ".join(f"{runs[name]['bits_per_byte']:.3f}" for name in curves)
    head = "tokens, bits per byte | " + " | ".join(names[name] for name in curves)
    return table(head, *lines, f"{millions(marks[-1])}, all held-out text | {whole}")


def library() -> str:
    """Bits per byte on another text, the source of Python's own library."""
    found = best("compare-library")
    lines = []
    for name, text in VARIANTS.items():
        r = found["1m", name]
        apart = " | " if name == "retnet" else f"{r['difference']:+.3f} | ± {r['difference_half_width']:.3f}"
        lines.append(f"{text} | {r['bits_per_byte']:.3f} | {apart}")
    return table("model | bits per byte | against RetNet | 95 % interval", *lines)


def muon() -> str:
    """Bits per byte with AdamW and with Muon, each at its best learning rate."""
    rows = [r for r in result("compare-optimizers", EPYC)["rows"] if r["best_rate"]]
    found, lines = {r["variant"]: r for r in rows}, []
    for name, text in (("retnet", "RetNet"), ("transformer", "twin")):
        ours, theirs = found[name], found[f"{name}+muon"]
        gain = theirs["bits_per_byte"] - ours["bits_per_byte"]
        cells = [f"{r['bits_per_byte']:.3f} | {r['lr']:g}" for r in (ours, theirs)]
        lines.append(" | ".join([text, *cells, f"{gain:+.3f}"]))
    return table(" | AdamW | learning rate | Muon | learning rate | difference", *lines)


def muon_hybrid() -> str:
    """Bits per byte of the hybrid and its twins with AdamW and with Muon, and what the hybrid gains, on each text."""
    found = {text: best(f"compare-hybrid-muon-{text}", ZEN4_LATER) for text in TEXTS}
    names = {"hybrid": KINDS["hybrid"], "hybrid-first": "hybrid, attention in the first block alone"}
    names["transformer-qk-norm-forget"] = "twin with QK-norm and a forget gate"
    names["transformer-qk-norm-forget-convolution"] = "the same with short convolutions"

    lines = []
    for name, title in names.items():
        for end, optimizer in (("", "AdamW"), ("+muon", "Muon")):
            rows = [of_text.get(("1m", name + end)) for of_text in found.values()]
            lines.append(" | ".join([title, optimizer, *(f"{r['bits_per_byte']:.3f}" if r else "–" for r in rows)]))
    gains = [rows["1m", "hybrid+muon"] for rows in found.values()]
    cells = [f"{r['difference']:+.3f} ± {r['difference_half_width']:.3f}" for r in gains]
    lines.insert(2, " | ".join(["difference, seed by seed", "", *cells]))
    return table(f"1.6 M parameters, bits per byte | optimiser | {' | '.join(TEXTS.values())}", *lines)


def recall() -> str:
    """Accuracy of associative recall, by number of pairs."""
    names = {
        "retnet": "RetNet",
        "retnet-paper": "the paper's RetNet",
        "no-decay": "the paper's without decay",
        "retnet-convolution": "RetNet with short convolutions",
        "hybrid": "hybrid, a window of 256 tokens",
        "hybrid-64": "hybrid, a window of 64 tokens",
        "transformer": "twin",
    }
    newest, of_paper = result("recall-hybrid", EPYC), result("recall", EPYC)
    rows = {r["variant"]: r for found in (of_paper, newest) for r in found["rows"]}
    pairs = newest["pairs"]
    lines = []
    for name, text in names.items():
        right = rows[name]["accuracy"]
        cells = [f"{100 * right[str(n)]:.0f} %" if str(n) in right else "–" for n in pairs]
        lines.append(" | ".join([text, *cells, f"{rows[name]['memory_bytes'] / 1000:.0f} kB"]))
    return table("right values | " + " | ".join(f"{n} pairs" for n in pairs) + " | memory", *lines)


def copying() -> str:
    """Right tokens of copied strings, by their length."""
    names = {
        "retnet": "RetNet",
        "retnet-convolution": "RetNet with short convolutions",
        "hybrid": "hybrid, a window of 256 tokens",
        "hybrid-64": "hybrid, a window of 64 tokens",
        "transformer": "twin",
    }
    found = result("copying", EPYC)
    rows = {r["variant"]: r for r in found["rows"]}
    lines = [
        " | ".join([text, *(f"{100 * rows[name]['accuracy'][str(n)]:.0f} %" for n in found["pairs"])])
        for name, text in names.items()
    ]
    return table("right tokens | " + " | ".join(f"{n} tokens" for n in found["pairs"]), *lines)


TEXTS = {"novels": "novels", "library": "Python source", "pairs": "pairs"}
"""Texts of compare-hybrid, and their columns."""
KINDS = {
    "hybrid": "hybrid",
    "retnet": "RetNet",
    "transformer": "twin",
    "transformer-qk-norm": "twin with QK-norm",
    "transformer-qk-norm-forget": "twin with QK-norm and a forget gate",
}
"""Models of compare-hybrid."""


def small(text: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows of the hybrid and others with 1.6 M parameters on a text. On novels and source a later file has more rates
    at every seed: its rows stand in place of the first file's."""
    chosen = best(f"compare-hybrid-rates-{text}", LATER) if text != "pairs" else {}
    return best(f"compare-hybrid-{text}") | chosen


def which() -> str:
    """Bits per byte of the hybrid, the RetNet and their twins on each text."""
    found = {text: small(text) for text in TEXTS}

    def cell(text: str, name: str) -> str:
        r = found[text].get(("1m", name))
        return f"{r['bits_per_byte']:.3f} ± {r['half_width']:.3f}" if r else "–"

    lines = [" | ".join([title, *(cell(text, name) for text in TEXTS)]) for name, title in KINDS.items()]
    last = [rows["1m", "transformer-qk-norm-forget"] for rows in found.values()]
    apart = [f"{r['difference']:.3f} ± {r['difference_half_width']:.3f}" for r in last]
    lines.append(" | ".join(["hybrid ahead of the last, seed by seed", *apart]))
    return table(f"bits per byte | {' | '.join(TEXTS.values())}", *lines)


def which_sizes() -> str:
    """Bits per byte of the hybrid beside others on novels, by size."""
    found = {"1m": small("novels")} | {n: best(f"compare-hybrid-{n}-novels") for n in ("2m", "5m", "10m")}
    sizes, lines = best("compare-sizes-default") | best("compare-sizes-10m", XEON), []
    for n, own in found.items():
        rows = sizes | own
        models = ("hybrid", "retnet", "transformer-qk-norm-forget", "transformer-qk-norm", "transformer")
        cells = [f"{rows[n, model]['bits_per_byte']:.3f}" for model in models]
        apart = rows[n, "transformer-qk-norm-forget"]
        doubt = apart.get("difference_half_width")  # none with one seed
        cells.append(f"{apart['difference']:.3f}" + (f" ± {doubt:.3f}" if doubt else ""))
        lines.append(" | ".join([millions(rows[n, "hybrid"]["parameters"]), *cells]))
    heads = [
        KINDS["hybrid"],
        KINDS["retnet"],
        "twin with QK-norm and forget gate",
        "twin with QK-norm",
        KINDS["transformer"],
    ]
    return table(f"novels, bits per byte | {' | '.join(heads)} | hybrid ahead of the best twin by", *lines)


def which_larger() -> str:
    """Bits per byte of the hybrid and of its best twin with 6 M parameters."""
    found = {text: best(f"compare-hybrid-5m-{text}") for text in TEXTS}
    ahead = {text: rows["5m", "transformer-qk-norm-forget"] for text, rows in found.items()}
    lines = [
        " | ".join([KINDS[name], *(f"{rows['5m', name]['bits_per_byte']:.3f}" for rows in found.values())])
        for name in ("hybrid", "transformer-qk-norm-forget")
    ]
    apart = [f"{r['difference']:.3f} ± {r['difference_half_width']:.3f}" for r in ahead.values()]
    return table(
        f"6 M parameters, bits per byte | {' | '.join(TEXTS.values())}", *lines, "difference | " + " | ".join(apart)
    )


def which_convolutions() -> str:
    """Bits per byte of models with short convolutions, at 1.6 M parameters, and their differences from the hybrid."""
    found = {text: best(f"compare-hybrid-first-{text}", LATER) for text in TEXTS}
    names = {
        "hybrid": KINDS["hybrid"],
        "hybrid-first": "hybrid, attention in the first block alone",
        "transformer-qk-norm-forget-convolution": "twin with QK-norm, a forget gate and short convolutions",
        "retnet-convolution": "RetNet with short convolutions",
    }

    def cell(r: dict[str, Any]) -> str:
        apart = f" ({r['difference']:+.3f} ± {r['difference_half_width']:.3f})" if r["variant"] != "hybrid" else ""
        return f"{r['bits_per_byte']:.3f}{apart}"

    lines = [" | ".join([title, *(cell(r["1m", name]) for r in found.values())]) for name, title in names.items()]
    return table(f"1.6 M parameters, bits per byte | {' | '.join(TEXTS.values())}", *lines)


def which_costs() -> str:
    """Memory, speed of decoding and of training of the hybrid beside the RetNet and the twin."""
    decoded, trained = native("decode-hybrid-130m", 8192), row(result("train-profile-5m", EPYC)["rows"], length=2048)
    names = {"RetNet": ("native-int4", "retnet"), "hybrid": ("native-hybrid-int4", "hybrid")}
    names["twin (grouped heads in the first two columns)"] = ("native-twin-int4", "transformer")
    lines = []
    for title, (engine, model) in names.items():
        cells = [size(decoded[engine]["state_bytes"]), f"{1000 * decoded[engine]['seconds']:.1f} ms"]
        lines.append(" | ".join([title, *cells, f"{trained[model]['tokens_per_second']:,.0f}"]))
    lines.append(f"Llama of transformers | – | – | {trained['llama']['tokens_per_second']:,.0f}")
    head = "model | 155 M in 4 bits: memory of a sequence of 8,192 tokens | time per token there | "
    head += "6 M: training tokens/s, rows of 2,048"
    return table(head, *lines)


def training_steps() -> str:
    """Tokens/s of training steps, 6.0 M parameters."""
    names = {"retnet": "RetNet", "hybrid": "hybrid", "transformer": "twin", "llama": "Llama of transformers"}
    rows = result("train-profile-5m", EPYC)["rows"]
    lines = [
        " | ".join([title, *(f"{row(rows, length=T)[name]['tokens_per_second']:,.0f}" for T in (2048, 8192))])
        for name, title in names.items()
    ]
    return table("tokens/s | rows of 2,048 tokens | rows of 8,192 tokens", *lines)


def compression() -> str:
    """Bits per byte beside a file compressor."""
    novels, demo = result("novels", EPYC), result("demo", EPYC)
    marks = novels["yardsticks"]
    lines = [
        f"four novels, `retnet-paper`, 5m | {marks['order-0 entropy']:.2f} | {marks['xz -9']:.2f} | "
        f"{novels['final'][1]:.2f}",
        f"modules of the Python library, `retnet`, 1m in four minutes (`make demo`) | {demo['order-0 entropy']:.2f} | "
        f"{demo['xz -9']:.2f} | {demo['this model']:.2f}",
    ]
    return table("held-out bits per byte | order-0 entropy | `xz -9` | RetNet", *lines)


def operator() -> str:
    """Time of the operator beside torchscale's and attention."""
    lines = []
    for shape, K, V in (("small", 64, 128), ("1.3B", 256, 512)):
        for T in (8192, 32768):
            models = row(result(f"retention-{shape}", EPYC)["rows"], T=T, dtype="fp32")["contestants"]
            ours = models["retentive"]["seconds"]
            others = [f"{times(models[name]['seconds'] / ours)} times" for name in ("torchscale", "sdpa")]
            lines.append(" | ".join([f"K = {K}, V = {V}, T = {T:,}", f"{ours * 1000:,.0f} ms", *others]))
    head = "forward and backward, float32, 8 heads | this package | torchscale, chunkwise | SDPA, as wide"
    return table(head, *lines)


def serving() -> str:
    """Server, engine and memory files, 6.0 M parameters."""
    engine, server = result("serving", EPYC), result("serving-http", EPYC)["server"]
    soak, asked = result("soak", EPYC), result("memory-ask", EPYC)["rows"]
    first = {name: f"{engine['first_token'][name]['median'] * 1000:.1f} ms" for name in ("miss", "hit")}
    states = [size(at["state"]) for at in engine["long_stream"]["at"]]
    lines = [
        f"16 streams together | {thousands(engine['tokens_per_second']['engine']['median'])} tokens/s | "
        + file("serving", EPYC, "serving"),
        f"16 streams together, against one | {times(engine['streams_over_one'])} times | "
        + file("serving", EPYC, "serving"),
        f"engine, against the bare batched step | {100 * engine['engine_over_bare']:.0f} % | "
        + file("serving", EPYC, "serving"),
        f"HTTP server, against the engine | {100 * server['server_over_engine']:.0f} % | "
        + file("serving-http", EPYC, "serving-http"),
        f"first token after a new prompt of 4,000 tokens | {first['miss']} | " + file("serving", EPYC, "serving"),
        f"first token after a cached prompt of 4,000 tokens | {first['hit']} | " + file("serving", EPYC, "serving"),
        f"memory of a stream after 100 tokens | {states[0]} | " + file("serving", EPYC, "serving"),
        f"memory of a stream after 100,000 tokens | {states[1]} | " + file("serving", EPYC, "serving"),
        f"question to a memory file of 1,000 tokens | {asked[0]['median']:.0f} ms | "
        + file("memory-ask", EPYC, "memory-ask"),
        f"question to a memory file of 1,000,000 tokens | {asked[1]['median']:.0f} ms | "
        + file("memory-ask", EPYC, "memory-ask"),
        f"right answers in {soak['minutes']:.0f} minutes of random clients | {soak['counts']['status 200']:,} | "
        + file("soak", EPYC, "soak"),
        f"wrong answers in that time | {soak['wrong_count']} | " + file("soak", EPYC, "soak"),
    ]
    return table("measure | value | file", *lines, text=1)
