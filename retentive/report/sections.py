"""The questions of the report: what the paper says to each, which of our files answer it, why the numbers differ.

Which question a file answers is told by the command that made it, which every file of results holds.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retentive import compare
from retentive.bench import BENCHES
from retentive.evals.run import table as task_table
from retentive.models import PEERS

Result = dict[str, Any]

PARTS = Path(__file__).with_name("paper.md").read_text(encoding="utf-8").split("\n## ")[1:]
PAPER = {heading: text for heading, _, text in (part.partition("\n") for part in PARTS)}
"""What the paper and others report, Markdown, by the headings of paper.md."""


def table(kind: str, result: Result) -> str | None:
    """The table that the command `kind` ("compare", "bench decode", …) prints, Markdown; None where it has none."""
    if "table" in result:
        return str(result["table"])
    verb, _, name = kind.partition(" ")
    if verb == "bench" and name in BENCHES:  # files of version 0.1.0 hold no table
        return importlib.import_module(BENCHES[name]).table(result)
    tables = {"compare": compare.table, "eval": lambda result: task_table(result["results"])}
    return tables[kind](result) if kind in tables else None


@dataclass(frozen=True)
class Section:
    """A question of the report."""

    title: str
    question: str
    paper: str
    """What the paper reports, Markdown; empty where it is silent."""
    takes: Callable[[str, Result], bool]
    """Whether a file of this kind and content belongs here."""
    differs: str
    """Why ours are not the paper's numbers."""


def _compares(about: str) -> Callable[[str, Result], bool]:
    """A `Section.takes` for comparisons of "sizes" (or learning rates), of "others" (other libraries), of "parts".

    The rows decide: any model of another library makes it "others"; else several sizes or rates make it "sizes".
    """

    def takes(kind: str, result: Result) -> bool:
        if kind != "compare":
            return False
        rows = result["rows"]
        # a variant of the user's own is of a model of ours, or it would not be there: peers have no fields to set
        known = [compare.VARIANTS[row["variant"]] for row in rows if row["variant"] in compare.VARIANTS]
        # first, since such a comparison may have several sizes as well
        if {variant.model for variant in known} & set(PEERS):
            return about == "others"
        several = any(len({row[key] for row in rows}) > 1 for key in ("size", "lr"))
        return about == ("sizes" if several else "parts")

    return takes


def _is(*kinds: str) -> Callable[[str, Result], bool]:
    """A `Section.takes` for the files of these commands."""
    return lambda kind, result: kind in kinds


def _replies(of_media: bool) -> Callable[[str, Result], bool]:
    """A `Section.takes` for files of `bench replies`: those of models that see or hear, or the others."""
    return lambda kind, result: (
        kind == "bench replies" and of_media == any(row.get("encoders") for row in result["rows"])
    )


def _eval(by_context: bool) -> Callable[[str, Result], bool]:
    """A `Section.takes` for files of `retentive eval`: those with rows by context length, or the others."""
    return lambda kind, result: kind == "eval" and by_context == any("context" in row for row in result["results"])


SECTIONS = (
    Section(
        "Quality by size",
        "Is a RetNet as good a language model as a Transformer of its size, trained on the same tokens?",
        PAPER["scaling"],
        _compares("sizes"),
        "The paper's models are a thousand times larger than what trains on a laptop, and its text is another: the "
        "order of the two and the slope can be compared, the values cannot.",
    ),
    Section(
        "Ablations",
        "What do the parts of retention contribute, and what do changes that the paper did not try?",
        PAPER["ablations"],
        _compares("parts"),
        "The paper does not say whether what a variant takes away is given back; here all have the same number of "
        "parameters, so that a part must be worth more than a wider feed-forward layer.",
    ),
    Section(
        "Other efficient models",
        "How do other architectures do on the same tokens?",
        PAPER["others"],
        _compares("others"),
        "The peers are the transformers library's own code and initialisation, in our training loop; RetNet without "
        "decay, among the ablations, is linear attention with the norms and gate of retention.",
    ),
    Section(
        "Longer contexts",
        "What is a longer context worth, in perplexity of the same last tokens?",
        PAPER["contexts"],
        _eval(by_context=True),
        "The paper trains at the longest length that it measures. Lengths beyond that of training show what a model "
        "makes of more context than it has learnt from. Tables with another longest length are of other tokens.",
    ),
    Section(
        "Recall",
        "How much can a state of constant size recall, beside attention, which keeps everything?",
        PAPER["recall"],
        _is("bench recall"),
        "A synthetic task on tiny models shows the mechanism alone; the loss of recalled tokens in the tables of "
        "comparisons shows it in text.",
    ),
    Section(
        "Tasks",
        "Zero-shot and few-shot accuracy on the paper's tasks.",
        PAPER["tasks"],
        _eval(by_context=False),
        "Models of a few million parameters are near chance on these tasks (25 % of four choices, 50 % of two), and "
        "the intervals say what is more; a part of a split is not comparable with the whole.",
    ),
    Section(
        "The cost of training",
        "Tokens per second and memory of a training step, beside a Transformer with SDPA; and how large numbers grow.",
        PAPER["training"],
        _is("bench train", "bench activations"),
        "The paper's rows are eight GPUs with FlashAttention's first version beside plain PyTorch. The ratio grows "
        "with the length, since attention's work does.",
    ),
    Section(
        "The cost of inference",
        "Memory, throughput and latency of decoding, and the time to read a prompt, against context and batch.",
        PAPER["decoding"],
        _is("bench decode", "bench prefill", "bench memory"),
        "The ratio depends on the sizes of state, cache and weights and on the context, not only on the machine; the "
        "context from which RetNet needs less memory is stated for full and for grouped heads.",
    ),
    Section(
        "Weights of fewer bits",
        "What do weights of 8 and 4 bits cost in held-out text, and how exact are states after a long one?",
        "",
        _is("bench quantization"),
        "The paper does not quantise.",
    ),
    Section(
        "Other runtimes",
        "What does a model take and do where it leaves this package: files, start, reading, writing, memory?",
        "",
        _is("bench edge"),
        "The paper names phones and other small machines, and measures none.",
    ),
    Section(
        "The operator",
        "Retention itself, forward and backward and step by step, beside its rivals and the machine's limits.",
        "",
        _is("bench retention", "bench step", "bench grid"),
        "The paper reports no times of the operator.",
    ),
    Section(
        "Talking, translating, summarising",
        "What does a small model learn to say, and how does its Transformer twin do after the same tokens?",
        "",
        _replies(of_media=False),
        "The paper names translation, summarisation and dialogue, and measures none of them by generation.",
    ),
    Section(
        "Seeing and listening",
        "What does a small model make of pictures and sound, and what its Transformer twin after the same tokens?",
        "",
        _replies(of_media=True),
        "The paper names multimodal models among what it leaves to later work.",
    ),
    Section(
        "Serving, memory, scoring",
        "What a state of constant size is good for once a model runs.",
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
