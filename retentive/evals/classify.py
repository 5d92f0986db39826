"""Classification of texts by log-likelihood: the label that the model would most likely write after a text.

classify(model, tokenizer, ["What a film!"], ["good", "bad"], prompt="Review: {text}\\nVerdict:")
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from retentive.data.tokenizer import Tokenizer
from retentive.evals.likelihood import encode, score
from retentive.models import LanguageModel
from retentive.options import check_type

PROMPT = "{text}\n"
"""Text before a label."""


class Classified(NamedTuple):
    """Label of a text, and the probability of each label."""

    label: str
    probabilities: dict[str, float]


def classify(
    model: LanguageModel,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    labels: Sequence[str],
    *,
    prompt: str = PROMPT,
    calibrate: bool = True,
) -> list[Classified]:
    """Returns the likeliest label of each text, with probabilities that sum to 1.

    Args:
        labels: two or more; none is the beginning of another.
        prompt: text before a label, with {text} for the text to classify.
        calibrate: divide each label's probability by the one that it has after an empty text (contextual calibration,
            arXiv 2102.09690), so that a label which the model writes often anyway has no advantage.

    Raises:
        ValueError: no texts, fewer than two labels, equal labels or one that begins another, or a prompt without
            {text}.
        ArithmeticError: the model's logits are not finite.
    """
    if isinstance(texts, str) or not texts:
        raise ValueError("`texts` must be a list of texts, one or more")
    if isinstance(labels, str):
        raise ValueError(f"`labels` must be a list of texts, two or more, got {labels!r}")
    for text in (*texts, *labels):
        check_type("a text or label", text, str)
    if len(labels) < 2:
        raise ValueError(f"`labels` must be two or more, got {len(labels)}")
    for n, label in enumerate(labels):
        if other := next((x for m, x in enumerate(labels) if m != n and x.startswith(label)), None):
            twice = f"stands twice in {list(labels)}" if other == label else f"is the beginning of {other!r}"
            raise ValueError(f"the label {label!r} {twice}: choose others")
    if "{text}" not in prompt:
        raise ValueError(f"`prompt` must have {{text}} where the text belongs, got {prompt!r:.60}")
    asked = [*texts, ""] if calibrate else list(texts)
    groups = [[encode(tokenizer, prompt.replace("{text}", text), f" {x}") for x in labels] for text in asked]
    found = torch.tensor([[each.logprob for each in row] for row in score(model, groups)], dtype=torch.float64)
    if calibrate:
        found = found[:-1] - found[-1]
    probabilities = found.softmax(-1).tolist()
    return [
        Classified(labels[max(range(len(labels)), key=row.__getitem__)], dict(zip(labels, row, strict=True)))
        for row in probabilities
    ]
