"""What figures.py writes into README.md and docs/numbers.md: each function makes the text of the block of its name."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

from retentive.models import cost, retnet, twin

ROOT = Path(__file__).resolve().parents[1]
EPYC, XEON, ZEN4 = "epyc-zen5-2core_202611", "xeon-amx-2core_202611", "epyc-zen4-2core_202611"
SEEDS = ("", "-seed1")
"""What the names of models end with in files of several seeds."""
SPEAKERS = {
    "george": EPYC,
    "jackson": EPYC,
    "lucas": ZEN4,
    "nicolas": ZEN4,
    "theo": ZEN4,
    "yweweler": ZEN4,
}
"""Who was held out, and the machine on which that was measured."""


@cache
def result(what: str, machine: str) -> dict[str, Any]:
    return json.loads((ROOT / "results" / f"{what}_{machine}.json").read_text(encoding="utf-8"))


def row(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """The one row in which these keys have these values."""
    (found,) = (r for r in rows if all(r[key] == value for key, value in wanted.items()))
    return found


def table(head: str, *rows: str) -> str:
    """Cells are separated by " | "; the first column is text, the others are numbers."""
    return "\n".join(f"| {line} |" for line in (head, "---" + " | ---:" * head.count("|"), *rows))


def times(x: float) -> str:
    return f"{x:.1f}" if x < 9.95 else f"{x:.0f}"


def size(count: float) -> str:
    """Bytes to two or three digits."""
    unit, name = (1e9, "GB") if count >= 1e9 else (1e6, "MB")
    return f"{count / unit:.{2 if count / unit < 1 else 1 if count / unit < 20 else 0}f} {name}"


def thousands(x: float) -> str:
    return f"{x / 1000:.1f} k"


def decoding(context: int, batch: int) -> dict[str, Any]:
    return row(result("decode-130m", XEON)["rows"], context=context, batch=batch)["models"]


def by_seed(rows: list[dict[str, Any]], model: str, task: str, metric: str) -> str:
    """What the trainings of a model with one seed after the other are at, in percent."""
    of_seeds = (row(rows, model=model + seed, task=task, metric=metric) for seed in SEEDS)
    return ", ".join(f"{100 * r['value']:.1f}" for r in of_seeds)


def heard(model: str, speakers: Sequence[str], task: str | None = None) -> list[list[dict[str, Any]]]:
    """Rows of wrong words by seed, one of each speaker held out: of what he said, or of another task of that model."""

    def wrong(speaker: str, seed: str) -> dict[str, Any]:
        rows = result(f"heard-{speaker}-1m", SPEAKERS[speaker])["rows"]
        return row(rows, model=model + seed, task=f"transcription:{task or speaker}", metric="wer")

    return [[wrong(speaker, seed) for speaker in speakers] for seed in SEEDS]


def difference(n: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The best rows of the paper's RetNet and its twin, in one size."""
    rows = result("compare-sizes", EPYC)["rows"]
    found = [row([r for r in rows if r["best_rate"]], size=n, variant=v) for v in ("retnet-paper", "transformer")]
    return found[0], found[1]


# README.md


def picture() -> str:
    first, last = (row(result("memory", EPYC)["rows"], context=n) for n in (512, 16384))
    ours, theirs = (
        [(size(r[model]["bytes"]), f"{r[model]['ms_per_token']:.1f}") for r in (first, last)]
        for model in ("RetNet", "Transformer twin")
    )
    return (
        "Follow the blue line: it stays where it is. From 512 to 16,384 tokens of context the Transformer's memory "
        f"grows from {theirs[0][0]} to {theirs[1][0]} and its time per token from {theirs[0][1]} to {theirs[1][1]} "
        f"ms; a RetNet of as many parameters keeps to {ours[1][0]} and takes {ours[0][1]} and {ours[1][1]} ms."
    )


def lead() -> str:
    """Bits per byte of this package's RetNet and its twins, by size."""
    rows = [r for r in result("compare-sizes-default", EPYC)["rows"] if r["best_rate"]]
    found = {(r["size"], r["variant"]): r for r in rows}
    names = ("retnet", "transformer-qk-norm", "transformer")
    return ", ".join(
        ", ".join(f"{found[n, name]['bits_per_byte']:.3f}" for name in names)
        + f" with {found[n, 'retnet']['parameters'] / 1e6:.1f} M parameters"
        for n in ("1m", "2m", "5m")
    )


def doubt() -> float:
    """Half the interval of the widest of those differences."""
    rows = [r for r in result("compare-sizes-default", EPYC)["rows"] if r["best_rate"] and r["variant"] != "retnet"]
    return max(r["difference_half_width"] for r in rows)


def claims() -> str:
    short, long = decoding(512, 8), decoding(32768, 8)
    speed = {name: models["retnet"]["tokens_per_second"] for name, models in (("short", short), ("long", long))}
    faster = speed["long"] / long["transformer"]["tokens_per_second"]
    ours, theirs = long["retnet"]["memory_bytes"], long["transformer"]["memory_bytes"]
    few, many = (row(result("train-130m", XEON)["rows"], length=n) for n in (2048, 32768))
    kept = many["retnet"]["tokens_per_second"] / few["retnet"]["tokens_per_second"]
    pairs = [difference(n) for n in ("1m", "2m", "5m")]
    behind = max(a["bits_per_byte"] / b["bits_per_byte"] - 1 for a, b in pairs)
    tokens = f"{pairs[0][0]['tokens'] / 1e6:.1f} M"
    bits = ", ".join(
        f"{a['bits_per_byte']:.3f} and {b['bits_per_byte']:.3f} with {a['parameters'] / 1e6:.1f} M parameters"
        for a, b in pairs
    )
    return (
        "1. **Writing does not slow down.** With 130 M parameters, eight sequences and 32,768 tokens of context it "
        f"goes at {speed['long'] / speed['short']:.0%} of the speed at 512 tokens, {faster:.0f} times the twin's, "
        f"and takes {size(ours)} with the weights where the twin takes {size(theirs)}.\n"
        f"2. **Training is linear in the length.** On rows of 32,768 tokens it goes at {kept:.0%} of the tokens/s of "
        f"rows of 2,048; the twin is {few['ratio']:.1f} times slower on rows of 2,048 and {many['ratio']:.1f} times "
        "on 32,768.\n"
        f"3. **The twin of the paper's RetNet is ahead, by at most {behind:.1%}.** Bits per byte of held-out novels "
        f"after the same {tokens} tokens, `retnet-paper` and twin: {bits}.\n"
        "4. **This package's RetNet is ahead of its twins on novels** "
        "([what differs](docs/idea.md#what-this-package-changes)). "
        f"The same novels and tokens, each at the better of two rates, retnet, twin with QK-norm, twin: {lead()}. Two "
        f"seeds each, a difference is known to ± {doubt():.3f}; of tokens that complete a pair which stood earlier "
        f"in the context the twins tell more in the two smaller sizes. {forgetting()} {later()} {elsewhere()}\n"
        f"5. **It sees and listens.** {media()}"
    )


def forgetting() -> str:
    """The twin whose attention has a decay for each token too."""
    found = {row["variant"]: row for row in result("compare-changes", EPYC)["rows"]}["transformer-forget"]
    return (
        f"With a forget gate in its attention the twin differs from it by {found['difference']:+.3f} ± "
        f"{found['difference_half_width']:.3f} ({found['parameters'] / 1e6:.1f} M parameters, "
        f"{found['tokens'] / 1e6:.1f} M tokens, {len(found['seeds'])} seeds)."
    )


def later() -> str:
    """The finding after more tokens."""
    found = {each["variant"]: each for each in result("compare-long", EPYC)["runs"]}
    ours, theirs, papers = (found[name] for name in ("retnet", "transformer-qk-norm", "retnet-paper"))
    return (
        f"After {ours['tokens'] / 1e6:.1f} M tokens with {ours['parameters'] / 1e6:.1f} M parameters (one seed): "
        f"{ours['bits_per_byte']:.3f}, the twin with QK-norm {theirs['bits_per_byte']:.3f}, the paper's RetNet "
        f"{papers['bits_per_byte']:.3f}."
    )


def elsewhere() -> str:
    """The finding on another text."""
    found = {each["variant"]: each for each in result("compare-library", EPYC)["rows"]}
    ours, names = found["retnet"], {"twin": "transformer", "twin with QK-norm": "transformer-qk-norm"}
    differ = ", ".join(
        f"{text} {found[name]['difference']:+.3f} ± {found[name]['difference_half_width']:.3f}"
        for text, name in names.items()
    )
    return (
        f"On other text, the source of Python's own library, bits per byte against RetNet's: {differ} "
        f"({ours['parameters'] / 1e6:.1f} M parameters, {ours['tokens'] / 1e6:.1f} M tokens, {len(ours['seeds'])} "
        "seeds at one rate)."
    )


def media() -> str:
    """Digits that were written and that were spoken, RetNet's figures before the twin's."""
    digits, slower = result("seen-digits-1m", EPYC)["rows"], result("seen-digits-half-rate-1m", ZEN4)["rows"]

    def right(rows: list[dict[str, Any]], model: str) -> str:
        return by_seed(rows, model, "answers:test", "exact")

    def wrong(model: str, task: str | None = None) -> str:
        return ", ".join(f"{100 * mean(r['value'] for r in rows):.1f}" for rows in heard(model, list(SPEAKERS), task))

    return (
        f"RetNet and twin by seed, at a rate that was chosen with RetNet: {right(digits, 'retnet')} and "
        f"{right(digits, 'twin')} % of handwritten digits are right, and {right(slower, 'twin')} with the twin at half "
        "of it ([see](docs/see.md#what-was-measured)). Of spoken ones "
        f"{wrong('retnet')} and {wrong('twin')} % are wrong when a speaker is held out, means of all {len(SPEAKERS)}, "
        f"and {wrong('retnet', 'turns50')} and {wrong('twin', 'turns50')} % of the last of fifty in turns, after "
        "training on five at most ([listen](docs/listen.md#what-was-measured))."
    )


def limits() -> str:
    even = result("decode-130m", XEON)["break_even"]
    paper = retnet("paper-1.3b", vocab_size=1)
    state = cost.state_bytes(paper)
    tokens = state / cost.cache_bytes(twin(paper), 1, bytes_per_value=2)
    return (
        f"- The state is constant, not small: {size(state)} in float32 for the paper's 1.3B model, as much as a bf16 "
        f"KV cache of {tokens:.0f} tokens. Our 130m takes less memory than its twin from {even['transformer']:,} "
        f"tokens of context on, and than one with grouped heads from {even['grouped']:,}; below, a Transformer takes "
        "less."
    )


# docs/numbers.md


def inference() -> str:
    """What the others need, as multiples of what RetNet does."""

    def line(what: str, models: dict[str, Any], ours: str, key: str = "tokens_per_second") -> str:
        cells = [what, ours]
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
        line("decoding at 32,768 tokens of context, 8 sequences", far, speed(far)),
        line("its memory, weights included", far, size(far["retnet"]["memory_bytes"]), "memory_bytes"),
        line("decoding at 2,048 tokens, one sequence", near, speed(near)),
    ]
    for n in (8192, 32768):
        models = row(result("prefill-130m", XEON)["rows"], length=n)["models"]
        lines.append(line(f"reading a prompt of {n:,} tokens", models, speed(models)))
    return table(" | RetNet | twin | twin, grouped heads | Llama of transformers", *lines)


def inference_limits() -> str:
    even, rows = result("decode-130m", XEON)["break_even"], result("decode-130m", XEON)["rows"]
    reached = [r["models"]["retnet"]["fraction"] for r in rows]
    return (
        f"RetNet's memory is the smaller one from {even['transformer']:,} tokens of context on, and from "
        f"{even['grouped']:,} beside grouped heads; at 512 tokens the grouped twin decodes faster. RetNet's step "
        f"stands at {min(reached):.0%} to {max(reached):.0%} of what reading its weights and state takes."
    )


def training() -> str:
    lines = []
    for r in result("train-130m", XEON)["rows"]:
        ours, theirs = r["retnet"], r["transformer"]
        speeds = [f"{model['tokens_per_second']:,.0f} tokens/s" for model in (ours, theirs)]
        memory = [size(model["peak_bytes"]) for model in (ours, theirs)]
        lines.append(" | ".join([f"{r['length']:,}", *speeds, f"{r['ratio']:.1f}", *memory]))
    return table("length of a row | RetNet | twin | ratio | RetNet: memory | twin: memory", *lines)


def training_small() -> str:
    lines = [
        f"{r['length']:,} | {thousands(r['retnet']['tokens_per_second'])} tokens/s | "
        f"{thousands(r['transformer']['tokens_per_second'])} tokens/s | {r['ratio']:.1f}"
        for r in result("train-step", EPYC)["rows"]
    ]
    return table("length of a row | RetNet | twin | ratio", *lines)


def quality() -> str:
    lines = []
    for n in ("1m", "2m", "5m"):
        ours, theirs = difference(n)
        lines.append(
            f"{ours['parameters'] / 1e6:.1f} M | {ours['bits_per_byte']:.3f} ± {ours['half_width']:.3f} | "
            f"{theirs['bits_per_byte']:.3f} ± {theirs['half_width']:.3f} | {-theirs['difference']:.3f} ± "
            f"{theirs['difference_half_width']:.3f} | {thousands(ours['tokens_per_second'])} | "
            f"{thousands(theirs['tokens_per_second'])}"
        )
    return table("parameters | RetNet | twin | difference | RetNet: tokens/s of training | twin: tokens/s", *lines)


VARIANTS = {
    "retnet": "RetNet",
    "transformer-qk-norm": "twin with QK-norm",
    "transformer": "twin",
    "retnet-paper": "the paper's RetNet",
}


def package() -> str:
    """This package's RetNet beside its twins and the paper's, in three sizes."""
    rows, lines = [r for r in result("compare-sizes-default", EPYC)["rows"] if r["best_rate"]], []
    for n in ("1m", "2m", "5m"):
        found = {name: row(rows, size=n, variant=name) for name in VARIANTS}
        cells = [f"{found[name]['bits_per_byte']:.3f} ± {found[name]['half_width']:.3f}" for name in VARIANTS]
        lines.append(" | ".join([f"{found['retnet']['parameters'] / 1e6:.1f} M", *cells]))
    return table("parameters | " + " | ".join(VARIANTS.values()), *lines)


def longer() -> str:
    """The same after more tokens: on the part of the held-out text that is looked at meanwhile, and on all of it."""
    runs = {each["variant"]: each for each in result("compare-long", EPYC)["runs"]}
    curves = {name: dict(runs[name]["curve"]) for name in VARIANTS if name in runs}
    marks = list(curves["retnet"])[1::2]
    lines = [
        f"{tokens / 1e6:.1f} M | " + " | ".join(f"{curve[tokens]:.3f}" for curve in curves.values()) for tokens in marks
    ]
    whole = " | ".join(f"{runs[name]['bits_per_byte']:.3f}" for name in curves)
    head = "tokens | " + " | ".join(VARIANTS[name] for name in curves)
    return table(head, *lines, f"{marks[-1] / 1e6:.1f} M, all held-out text | {whole}")


def contexts() -> str:
    """Perplexity of the same last tokens, by length of context."""
    found = {}
    for model in ("retnet", "transformer"):
        rows = [r for r in result(f"contexts-novels-{model}", EPYC)["results"] if r["metric"] == "perplexity"]
        found[model] = {r["context"]: r["value"] for r in rows}
    lines = [f"{n:,} | {found['retnet'][n]:.1f} | {found['transformer'][n]:.1f}" for n in found["retnet"]]
    return table("context | RetNet | twin", *lines)


def ablations() -> str:
    names = {
        "no-gate": "without the gate",
        "no-decay": "without decay, which is linear attention",
        "one-decay": "one decay for all heads",
        "small-heads": "small heads",
        "short-head": "a first head that forgets at once",
        "paper-decay": "the decays of the paper's equation 8",
        "no-score-norm": "no norm of the scores",
        "hybrid": "one block of attention",
        "gated": "a decay from the token itself",
        "no-head-norm": "no norm of the heads",
    }
    rows = {r["variant"]: r for r in result("compare-ablations", EPYC)["rows"]}
    lines = [
        f"{text} | {rows[name]['difference']:+.3f} ± {rows[name]['difference_half_width']:.3f}"
        for name, text in sorted(names.items(), key=lambda pair: -rows[pair[0]]["difference"])
    ]
    return table("of RetNet's parts | bits per byte, against `retnet-paper`", *lines)


def muon() -> str:
    names = {"retnet": "RetNet", "transformer": "twin"}
    found = {r["variant"]: r for r in result("compare-optimizers", EPYC)["rows"] if r["best_rate"]}
    lines = []
    for name, text in names.items():
        cells = []
        for r in (found[name], found[f"{name}+muon"]):
            cells.append(f"{r['bits_per_byte']:.3f} ± {r['half_width']:.3f} | {r['lr']:g}")
        gain = found[f"{name}+muon"]["bits_per_byte"] - found[name]["bits_per_byte"]
        lines.append(" | ".join([text, *cells, f"{gain:+.3f}"]))
    return table(" | AdamW | at | Muon | at | difference", *lines)


def operator() -> str:
    lines = []
    for shape, K, V in (("small", 64, 128), ("1.3B", 256, 512)):
        for T in (8192, 32768):
            models = row(result(f"retention-{shape}", EPYC)["rows"], T=T, dtype="fp32")["contestants"]
            ours = models["retentive"]["seconds"]
            others = [f"{times(models[name]['seconds'] / ours)} times" for name in ("torchscale", "sdpa")]
            lines.append(" | ".join([f"K = {K}, V = {V}, T = {T:,}", f"{ours * 1000:,.0f} ms", *others]))
    head = "forward and backward, float32, 8 heads | this package | torchscale, chunkwise | SDPA, as wide"
    return table(head, *lines)


def one_sequence() -> str:
    ours, theirs = "RetNet", "Transformer twin"
    lines = [
        f"{n:,} | {size(r[ours]['bytes'])} | {size(r[theirs]['bytes'])} | {r[ours]['ms_per_token']:.1f} | "
        f"{r[theirs]['ms_per_token']:.1f}"
        for n in (512, 2048, 16384)
        for r in [row(result("memory", EPYC)["rows"], context=n)]
    ]
    return table("context | RetNet: memory | twin: memory | RetNet: ms/token | twin: ms/token", *lines)


def serving() -> str:
    engine, server = result("serving", EPYC), result("serving-http", EPYC)["server"]
    soak, asked = result("soak", EPYC), result("memory-ask", EPYC)["rows"]
    first = {name: engine["first_token"][name]["median"] * 1000 for name in ("miss", "hit")}
    states = [at["state"] for at in engine["long_stream"]["at"]]
    lines = [
        f"16 streams together, of one | {times(engine['streams_over_one'])} times | "
        f"{thousands(engine['tokens_per_second']['engine']['median'])} tokens/s",
        f"engine, of the bare batched step | {engine['engine_over_bare']:.0%} | ",
        f"server, of the engine | {server['server_over_engine']:.0%} | ",
        f"first token after a 4,000-token prompt | {first['miss']:.0f} ms | {first['hit']:.1f} ms where the prompt was "
        f"read before",
        "state of a stream, with the ring of its newest tokens, after 100 and 100,000 tokens | "
        f"{size(states[0])} | {size(states[1])}",
        f"a question to a memory of 1,000 and 1,000,000 tokens | {asked[0]['median']:.0f} ms | "
        f"{asked[1]['median']:.0f} ms, from {size(asked[1]['file_bytes'])}",
        f"{soak['minutes']:.0f} minutes of random clients | {soak['counts']['status 200']:,} answers | "
        f"{soak['wrong_count']} wrong",
    ]
    return table("serving, 6.0 M parameters | | ", *lines)


def compression() -> str:
    novels, demo = result("novels", EPYC), result("demo", EPYC)
    marks = novels["yardsticks"]
    lines = [
        f"four novels, `retnet-paper`, 5m | {marks['order-0 entropy']:.2f} | {marks['xz -9']:.2f} | "
        f"{novels['final'][1]:.2f}",
        f"modules of the Python library, `retnet`, 1m in four minutes (`make demo`) | {demo['order-0 entropy']:.2f} | "
        f"{demo['xz -9']:.2f} | {demo['this model']:.2f}",
    ]
    return table("held-out bits per byte | order-0 entropy | `xz -9` | RetNet", *lines)
