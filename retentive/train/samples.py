"""Text samples during training, always with the same seed, so that only training makes them differ."""

from retentive.data.media import Rows
from retentive.data.templates import ChatTemplate
from retentive.data.tokenizer import Tokenizer
from retentive.infer import SamplingParams, generate, write_on
from retentive.models import LanguageModel


def sample_text(model: LanguageModel, tokenizer: Tokenizer, prompt: str, *, tokens: int = 80) -> str:
    """The model's continuation of `prompt`, always with the same seed."""
    training = model.training
    params = SamplingParams(temperature=0.8, top_p=0.95, seed=0)
    text = "".join(write_on(model.eval(), tokenizer, prompt, params, max_tokens=tokens))
    model.train(training)
    return text


def sample_answer(
    model: LanguageModel,
    template: ChatTemplate,
    ids: list[int],
    rows: Rows | None = None,
    *,
    tokens: int = 80,
) -> str:
    """Text of a conversation and of the model's answer, always with the same seed.

    Args:
        ids: tokens of the conversation.
        rows: its pictures and sound.
    """
    training = model.training
    params = SamplingParams(temperature=0.8, top_p=0.95, seed=0)
    stop_ids = sorted(template.stop_ids)
    answer = generate(model.eval(), ids, params, rows=rows, max_tokens=tokens, stop_ids=stop_ids)
    said = [id for id in ids if id < template.tokenizer.vocab_size]  # pictures and sound have no text
    text = template.tokenizer.decode([*said, *(token.id for token in answer)])
    model.train(training)
    return text
