"""What a model writes while it is trained, always with the same seed: only training makes samples differ."""

from retentive.data.media import Rows
from retentive.data.templates import ChatTemplate
from retentive.data.tokenizer import Tokenizer
from retentive.infer import SamplingParams, generate, write_on
from retentive.models import LanguageModel


def sample_text(model: LanguageModel, tokenizer: Tokenizer, prompt: str, *, tokens: int = 80) -> str:
    """What the model writes after `prompt`, always with the same seed: only training makes samples differ."""
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
    """A conversation's ids and the model's answer to them as text, always with the same seed; rows: its media."""
    training = model.training
    params = SamplingParams(temperature=0.8, top_p=0.95, seed=0)
    stop_ids = sorted(template.stop_ids)
    answer = generate(model.eval(), ids, params, rows=rows, max_tokens=tokens, stop_ids=stop_ids)
    said = [id for id in ids if id < template.tokenizer.vocab_size]  # of pictures and sound there is no text
    text = template.tokenizer.decode([*said, *(token.id for token in answer)])
    model.train(training)
    return text
