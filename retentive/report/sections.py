"""Questions of the report: the paper's numbers for each, the files that answer it, and why the numbers differ.

The command stored in each file of results decides which question it answers.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retentive.bench import BENCHES
from retentive.compare import VARIANTS
from retentive.compare import table as comparison_table
from retentive.evals.run import table as task_table
from retentive.models import PEERS

Result = dict[str, Any]

PARTS = Path(__file__).with_name("paper.md").read_text(encoding="utf-8").split("\n## ")[1:]
PAPER = {heading: text for heading, _, text in (part.partition("\n") for part in PARTS)}
"""Numbers that the paper and others report, in Markdown, by the headings of paper.md."""


def table(kind: str, result: Result) -> str | None:
    """Returns the Markdown table that the command `kind` ("compare", "bench decode", …) prints; None without one."""
    if "table" in result:
        return str(result["table"])
    verb, _, name = kind.partition(" ")
    if verb == "bench" and name in BENCHES:  # files of version 0.1.0 hold no table
        return importlib.import_module(BENCHES[name]).table(result)
    tables = {"compare": comparison_table, "eval": lambda result: task_table(result["results"])}
    return tables[kind](result) if kind in tables else None


@dataclass(frozen=True)
class Section:
    """One question of the report."""

    title: str
    question: str
    paper: str
    """Numbers from the paper, in Markdown; empty if it has none."""
    takes: Callable[[str, Result], bool]
    """Returns True if a file of this kind and content belongs here."""
    differs: str
    """Why our numbers differ from the paper's."""


def _compares(about: str) -> Callable[[str, Result], bool]:
    """Returns a `Section.takes` for comparisons of "sizes" (or learning rates), "others" (other libraries) or "parts".

    Decided by the rows: a model of another library makes it "others", several sizes or learning rates "sizes".
    """

    def takes(kind: str, result: Result) -> bool:
        if kind != "compare":
            return False
        rows = result["rows"]
        # user-defined variants are always of our models: peers have no fields to set
        known = [VARIANTS[row["variant"]] for row in rows if row["variant"] in VARIANTS]
        # checked first, since such a comparison may have several sizes too
        if {variant.model for variant in known} & set(PEERS):
            return about == "others"
        several = any(len({row[key] for row in rows}) > 1 for key in ("size", "lr"))
        return about == ("sizes" if several else "parts")

    return takes


def _is(*kinds: str) -> Callable[[str, Result], bool]:
    """Returns a `Section.takes` for the files of these commands."""
    return lambda kind, result: kind in kinds


def _replies(of_media: bool) -> Callable[[str, Result], bool]:
    """Returns a `Section.takes` for files of `bench replies`, with or without models that take media."""
    return lambda kind, result: (
        kind == "bench replies" and of_media == any(row.get("encoders") for row in result["rows"])
    )


def _eval(by_context: bool) -> Callable[[str, Result], bool]:
    """Returns a `Section.takes` for files of `retentive eval`, with or without rows by context length."""
    return lambda kind, result: kind == "eval" and by_context == any("context" in row for row in result["results"])


SECTIONS = (
    Section(
        "Quality by size",
        "Is RetNet as good a language model as a Transformer of the same size, trained on the same tokens?",
        PAPER["scaling"],
        _compares("sizes"),
        "The paper's models are a thousand times larger than those here, and trained on other text. The order of the "
        "two and the slope can be compared, the values cannot.",
    ),
    Section(
        "Ablations",
        "What do the parts of retention contribute, and what do changes beyond the paper contribute?",
        PAPER["ablations"],
        _compares("parts"),
        "The paper does not say whether removed parameters are given back. Here all variants have the same number of "
        "parameters, so a part must be worth more than a wider feed-forward layer.",
    ),
    Section(
        "Other efficient models",
        "How good are other architectures on the same tokens?",
        PAPER["others"],
        _compares("others"),
        "The peers use the transformers library's code and initialisation in our training loop. RetNet without decay, "
        "among the ablations, is linear attention with the norms and gate of retention.",
    ),
    Section(
        "Longer contexts",
        "How much does a longer context lower the perplexity of the same last tokens?",
        PAPER["contexts"],
        _eval(by_context=True),
        "The paper trains at the longest length that it measures. Lengths beyond the training length show how a model "
        "extrapolates. Tables with another longest length predict other tokens.",
    ),
    Section(
        "Recall",
        "How much can a state of constant size recall, compared with attention, which keeps everything?",
        PAPER["recall"],
        _is("bench recall"),
        "A synthetic task on tiny models isolates the mechanism; the loss of recalled tokens in the tables of "
        "comparisons shows it in text.",
    ),
    Section(
        "Tasks",
        "Zero-shot and few-shot accuracy on the paper's tasks.",
        PAPER["tasks"],
        _eval(by_context=False),
        "Models of a few million parameters are near chance on these tasks (25 % for four choices, 50 % for two), and "
        "the intervals show which are above it. A part of a split is not comparable with the whole.",
    ),
    Section(
        "Training cost",
        "Tokens per second and memory of a training step, beside a Transformer with SDPA; growth of activations.",
        PAPER["training"],
        _is("bench train", "bench activations"),
        "The paper compares on eight GPUs with FlashAttention's first version and plain PyTorch. The ratio grows with "
        "the length, as attention's work does.",
    ),
    Section(
        "Inference cost",
        "Memory, throughput and latency of decoding, and time to read a prompt, by context length and batch.",
        PAPER["decoding"],
        _is("bench decode", "bench prefill", "bench memory"),
        "The ratio depends on the sizes of state, cache and weights and on the context, not only on the machine. The "
        "context from which RetNet needs less memory is given for full and for grouped heads.",
    ),
    Section(
        "Quantisation",
        "How much held-out loss do weights and states of fewer bits cost, and how exact are states after a long text?",
        "",
        _is("bench quantization", "bench state-precision"),
        "The paper does not quantise.",
    ),
    Section(
        "Other runtimes",
        "How do exported models compare in file size, start, prefill, decoding and memory?",
        "",
        _is("bench edge"),
        "The paper names phones and other small machines, but measures none.",
    ),
    Section(
        "The operator",
        "Retention itself, forward, backward and step by step, beside its rivals and the machine's limits.",
        "",
        _is("bench retention", "bench step", "bench grid"),
        "The paper reports no times of the operator.",
    ),
    Section(
        "Chat, translation, summarisation",
        "What does a small model learn to write, and how does its Transformer twin do after the same tokens?",
        "",
        _replies(of_media=False),
        "The paper names translation, summarisation and dialogue, but measures none of them by generation.",
    ),
    Section(
        "Pictures and sound",
        "What does a small model learn from pictures and sound, and its Transformer twin after the same tokens?",
        "",
        _replies(of_media=True),
        "The paper leaves multimodal models to later work.",
    ),
    Section(
        "Students of Transformers",
        "How close does a model of constant memory come to the Transformer that it was made from?",
        "",
        _is("bench students"),
        "The paper trains all models from the beginning.",
    ),
    Section(
        "Serving, memory, scoring",
        "Uses of a state of constant size once a model runs.",
        "",
        _is(
            "bench serving",
            "bench ask",
            "bench questions",
            "bench sound",
            "bench prompting",
            "bench scoring",
            "bench speculation",
            "bench soak",
        ),
        "The paper has no counterpart.",
    ),
)
