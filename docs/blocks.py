"""Helpers of the page blocks, and the blocks of README.md and docs/index.md.

Each function without arguments returns the Markdown of the block of its name. figures.py writes the blocks. Links in a
block are relative to the root of the repository.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

from retentive.models import cost, retnet, twin

ROOT = Path(__file__).resolve().parents[1]
EPYC, XEON, ZEN4 = "epyc-zen5-2core_202611", "xeon-amx-2core_202611", "epyc-zen4-2core_202611"
LATER, ZEN4_LATER = "xeon-amx-2core_202612", "epyc-zen4-2core_202612"
SEEDS = ("", "-seed1")
"""Endings of the models' names in files of two seeds."""
SPEAKERS = {
    "george": EPYC,
    "jackson": EPYC,
    "lucas": ZEN4,
    "nicolas": ZEN4,
    "theo": ZEN4,
    "yweweler": ZEN4,
}
"""Held-out speakers, and the machine that measured each."""
NATIVE = "decode-native-130m"
"""This package's RetNet in C beside llama.cpp, whose Transformer has one key-value head for seven query heads."""
TWINS = "decode-twins-130m"
"""In 4 bits: RetNet, hybrid and Transformer in C, and llama.cpp, to 32,768 tokens, in one run."""
LONG, FULL = "decode-native-32k-130m", "decode-native-full-heads-130m"
"""The same at 32,768 tokens, and beside a Transformer with a key-value head for every query head, the twin."""


@cache
def result(what: str, machine: str) -> dict[str, Any]:
    """Content of one file of results/."""
    return json.loads((ROOT / "results" / f"{what}_{machine}.json").read_text(encoding="utf-8"))


def file(what: str, machine: str, text: str) -> str:
    """Link to a file of results/."""
    return f"[{text}](results/{what}_{machine}.json)"


def row(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """The one row in which these keys have these values."""
    (found,) = (r for r in rows if all(r[key] == value for key, value in wanted.items()))
    return found


def table(head: str, *rows: str, text: int = 0) -> str:
    """Markdown table, cells separated by " | ". The first column and the last `text` ones are words, not numbers."""
    numbers = head.count("|") - text
    return "\n".join(f"| {line} |" for line in (head, "---" + " | ---:" * numbers + " | ---" * text, *rows))


def times(x: float) -> str:
    """A ratio to two digits."""
    return f"{x:.1f}" if x < 9.95 else f"{x:.0f}"


def size(count: float) -> str:
    """Bytes to two or three digits."""
    unit, name = (1e9, "GB") if count >= 1e9 else (1e6, "MB")
    return f"{count / unit:.{2 if count / unit < 1 else 1 if count / unit < 20 else 0}f} {name}"


def thousands(x: float) -> str:
    """A number in thousands."""
    return f"{x / 1000:.1f} k"


def train_ratio(of: dict[str, Any]) -> float:
    """Training throughput of RetNet relative to its twin's."""
    return of["retnet"]["tokens_per_second"] / of["transformer"]["tokens_per_second"]


def millions(x: float) -> str:
    """A number in millions."""
    return f"{x / 1e6:.1f} M"


def native(what: str, context: int, batch: int = 1, machine: str = EPYC) -> dict[str, Any]:
    """Models of a decoding file, at one context and batch."""
    return row(result(what, machine)["rows"], context=context, batch=batch)["models"]


def best(what: str, machine: str = EPYC) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows of a comparison at each variant's best learning rate, by size and variant."""
    rows = result(what, machine)["rows"]
    return {(r["size"], r["variant"]): r for r in rows if r["best_rate"]}


def by_seed(rows: list[dict[str, Any]], model: str, task: str, metric: str) -> list[dict[str, Any]]:
    """Rows of one task, one for each seed."""
    return [row(rows, model=model + seed, task=task, metric=metric) for seed in SEEDS]


def average(rows: list[dict[str, Any]]) -> str:
    """Mean of rows in percent."""
    return f"{100 * mean(r['value'] for r in rows):.1f} %"


def heard(model: str, speakers: Sequence[str], task: str | None = None) -> list[list[dict[str, Any]]]:
    """Rows of word error rate by seed, one for each held-out speaker: of that speaker, or of another task."""

    def wrong(speaker: str, seed: str) -> dict[str, Any]:
        rows = result(f"heard-{speaker}-1m", SPEAKERS[speaker])["rows"]
        return row(rows, model=model + seed, task=f"transcription:{task or speaker}", metric="wer")

    return [[wrong(speaker, seed) for speaker in speakers] for seed in SEEDS]


def perplexities(model: str) -> dict[int, float]:
    """Perplexity of the same last tokens of novels, by length of context."""
    rows = result(f"contexts-novels-{model}", EPYC)["results"]
    return {r["context"]: r["value"] for r in rows if r["metric"] == "perplexity"}


def picture() -> str:
    """Caption of docs/front.png."""
    models = native(TWINS, 32768, machine=ZEN4)
    ours, theirs = (f"{1000 * models[name]['seconds']:.1f} ms" for name in ("native-int4", "native-twin-int4"))
    return (
        "Memory and time per token against context, 155 M parameters in 4 bits on two CPU cores. At 32,768 tokens the "
        f"RetNet takes {ours} a token, its Transformer twin with grouped heads, in the same engine, {theirs}."
    )


def claims() -> str:
    """The claims of the front page: one number for RetNet, one for its rival, and the file of both."""
    fast, full = native(TWINS, 8192, machine=ZEN4), native(FULL, 8192)
    ours = retnet("130m", vocab_size=32000)
    config, grouped = twin(ours), twin(ours, kv_heads=1)
    trained = row(result("train-default-130m", EPYC)["rows"], length=8192)
    contexts = {model: perplexities(model)[8192] for model in ("retnet", "transformer")}
    digits, slower = result("seen-digits-1m", EPYC)["rows"], result("seen-digits-half-rate-1m", ZEN4)["rows"]
    of_recall = result("recall-hybrid", EPYC)["rows"]
    pairs = {r["variant"]: f"{r['accuracy']['32']:.0%}".replace("%", " %") for r in of_recall}

    texts = {"novels": "novels", "library": "Python source", "pairs": "English-Japanese pairs"}

    def quality(text: str, title: str) -> str:
        found = best(f"compare-hybrid-5m-{text}")
        tokens = millions(found["5m", "hybrid"]["tokens"])
        ours, twins = (found["5m", v]["bits_per_byte"] for v in ("hybrid", "transformer-qk-norm-forget"))
        return f"{title}, held-out bits per byte | {ours:.3f} (hybrid) | {twins:.3f} | lower | " + file(
            f"compare-hybrid-5m-{text}", EPYC, f"6.0 M, {tokens} tokens, twin with QK-norm and a forget gate"
        )

    def spoken(model: str) -> str:
        return average([r for rows in heard(model, list(SPEAKERS)) for r in rows])

    def drawn(rows: list[dict[str, Any]], model: str) -> str:
        return average(by_seed(rows, model, "answers:test", "exact"))

    state, paper = size(fast["native-int4"]["state_bytes"]), "the paper's RetNet"
    lines = [
        f"time per token after 8,192 tokens, 4-bit weights | {1000 * fast['native-int4']['seconds']:.1f} ms | "
        f"{1000 * fast['native-twin-int4']['seconds']:.1f} ms ({1000 * fast['llamacpp-q4_0']['seconds']:.1f} ms in "
        "llama.cpp) | lower | " + file(TWINS, ZEN4, "155 M, C engine, a Zen 4, twin with grouped heads"),
        f"memory of a sequence of 8,192 tokens | {state} | {size(full['llamacpp-q4_0']['state_bytes'])} "
        f"({size(fast['llamacpp-q4_0']['state_bytes'])} with grouped heads) | lower | "
        + file(FULL, EPYC, "155 M, C engine"),
        f"memory of a sequence of 65,536 tokens | {state} | "
        f"{size(cost.cache_bytes(config, 65536, bytes_per_value=2))} "
        f"({size(cost.cache_bytes(grouped, 65536, bytes_per_value=2))} with grouped heads) | lower | "
        "155 M, computed from the shapes",
        f"training on rows of 8,192 tokens | {trained['retnet']['tokens_per_second']:,.0f} tokens/s | "
        f"{trained['transformer']['tokens_per_second']:,.0f} tokens/s | higher | "
        + file("train-default-130m", EPYC, "130 M, blocks recomputed"),
        *(quality(*text) for text in texts.items()),
        f"novels, perplexity after 8,192 tokens, trained on 1,024 | {contexts['retnet']:.1f} | "
        f"{contexts['transformer']:.1f} | lower | "
        + f"6.0 M: {file('contexts-novels-retnet', EPYC, paper)}, "
        + file("contexts-novels-transformer", EPYC, "plain twin")
        + " (a twin [with a forget gate](docs/numbers.md#long-contexts) does not get worse)",
        f"pictures: handwritten digits read rightly | {drawn(digits, 'retnet')} | {drawn(slower, 'twin')} | higher | "
        + f"1.1 M: {file('seen-digits-1m', EPYC, 'RetNet')}, "
        + file("seen-digits-half-rate-1m", ZEN4, "twin at its better learning rate"),
        f"sound: digits of a new speaker misheard | {spoken('retnet')} | {spoken('twin')} | lower | "
        + f"[1.1 M, mean of {len(SPEAKERS)} speakers, one learning rate](docs/listen.md#results)",
        f"recall of 32 key-value pairs | {pairs['retnet']} (hybrid, in its window: {pairs['hybrid']}) | "
        f"{pairs['transformer']} | higher | " + file("recall-hybrid", EPYC, "two layers of width 64"),
    ]
    return table("claim | RetNet | twin | better | measured", *lines, text=2)


def limits() -> str:
    """The size of the state, as the README's list of limitations says it."""
    even = result("decode-130m", XEON)["break_even"]
    paper = retnet("paper-1.3b", vocab_size=1)
    state = cost.state_bytes(paper)
    tokens = state / cost.cache_bytes(twin(paper), 1, bytes_per_value=2)
    return (
        f"- The state is constant, not small. For the paper's 1.3B model it takes {size(state)} in float32, as much as "
        f"a bf16 KV cache of {tokens:.0f} tokens. Our 130m, with a ring of its last tokens, needs less memory than its "
        f"twin above {even['transformer']:,} tokens of context, and less than a twin with grouped heads above "
        f"{even['grouped']:,}."
    )
