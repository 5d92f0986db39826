"""Classification by log-likelihood, held against log probabilities that the model gives token by token."""

import pytest
import torch

import retentive
from retentive.data.tokenizer import ByteTokenizer
from retentive.models import retnet
from tests.export.variants import TINY, peaked_model

OWN, LABELS = ByteTokenizer(), ["good", "bad"]


@pytest.fixture(scope="module")
def model():
    return peaked_model(retnet(**TINY))


def likelihood(model, prompt: str, label: str) -> float:
    """Log-likelihood of the label after the prompt, whose spaces and line ends at the end count with the label."""
    before, whole = OWN.encode(prompt.rstrip()), OWN.encode(f"{prompt} {label}")
    with torch.no_grad():
        logits, _ = model(torch.tensor([[OWN.eos_id, *whole]]))
    logprobs = logits[0].double().log_softmax(-1)
    return sum(float(logprobs[t, whole[t]]) for t in range(len(before), len(whole)))


@pytest.mark.parametrize("calibrate", [True, False])
def test_probabilities_are_of_the_labels_after_the_text(calibrate, model):
    how = dict(prompt="Review: {text}\nVerdict:", calibrate=calibrate)
    found = retentive.classify(model, ["What a film!", "Boring"], LABELS, tokenizer=OWN, **how)
    for text, each in zip(["What a film!", "Boring"], found, strict=True):
        scores = torch.tensor([likelihood(model, f"Review: {text}\nVerdict:", x) for x in LABELS])
        if calibrate:
            scores -= torch.tensor([likelihood(model, "Review: \nVerdict:", x) for x in LABELS])
        wanted = scores.softmax(0)
        # float32 logits of a label's 4 bytes
        torch.testing.assert_close(torch.tensor(list(each.probabilities.values())), wanted, rtol=1e-3, atol=1e-4)
        assert each.label == LABELS[int(wanted.argmax())] and list(each.probabilities) == LABELS


@pytest.mark.parametrize(
    ("texts", "labels", "options", "words"),
    [
        ([], LABELS, {}, "`texts` must be a list of texts, one or more"),
        ("a", LABELS, {}, "`texts` must be a list"),
        (["a"], ["good"], {}, "`labels` must be two or more, got 1"),
        (["a"], ["good", "goodness"], {}, "the label 'good' is the beginning of 'goodness': choose others"),
        (["a"], ["good", "good"], {}, "the label 'good' stands twice"),
        (["a"], ["good", 3], {}, "a text or label must be a string, got 3"),
        (["a"], LABELS, {"prompt": "Verdict:"}, "`prompt` must have {text} where the text belongs"),
        (["a"], LABELS, {"calibration": True}, "classify has no option 'calibration': did you mean calibrate?"),
    ],
)
def test_bad_input(texts, labels, options, words, model):
    with pytest.raises((TypeError, ValueError)) as raised:
        retentive.classify(model, texts, labels, tokenizer=OWN, **options)
    assert words in str(raised.value)
