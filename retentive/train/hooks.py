"""Hooks of a run between its steps: evaluation on held-out text, and samples of the model's text."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from retentive.data.mixture import Mixture
from retentive.data.packed import Packed
from retentive.evals.heldout import HeldOut, held_out_loss, mixture_loss
from retentive.models import LanguageModel
from retentive.train.config import TrainConfig
from retentive.train.log import Silence
from retentive.train.parallel import reading
from retentive.train.samples import sample_answer, sample_text
from retentive.train.step import Training

Callback = Callable[[Training, dict[str, Any]], object]


@dataclass(frozen=True)
class Hooks:
    """Callbacks of a run between its steps, and its output."""

    evaluate: Callable[[LanguageModel, int], HeldOut] | None = None
    """(model, maximum tokens) -> held-out loss, called every `eval_every` steps and at the end."""
    sample: Callable[[LanguageModel], str] | None = None
    """model -> text, called every `sample_every` steps."""
    callbacks: Sequence[Callback] = ()
    """Called with the training and the step's metrics (loss, lr, grad_norm) after every step, on rank 0."""
    title: str = ""
    """First line of the log."""
    quiet: bool = False
    """Write metrics.jsonl only, and print nothing."""


def report(training: Training, hooks: Hooks, log: Silence) -> None:
    """Evaluate and sample if the step is due: on rank 0, or on all ranks if they divide the model.

    Ranks that divide the model compute the same numbers together, and rank 0 logs them. Uses the averaged weights if
    there are any.
    """
    config, step, cluster = training.config, training.step, training.cluster
    last = step == config.steps
    evaluates = hooks.evaluate and (last or (config.eval_every and step % config.eval_every == 0))
    samples = hooks.sample and config.sample_every and (last or step % config.sample_every == 0)
    if not (evaluates or samples) or not (cluster.sharded or cluster.main):
        return
    averages = training.ema.in_place() if training.ema else nullcontext()
    with averages, training.rounded(), reading(training.model, cluster):
        if hooks.evaluate and evaluates:
            found = hooks.evaluate(training.model, config.eval_tokens)
            log.held_out(step, found)
            if last and not found.exhausted(config.eval_tokens):
                found = hooks.evaluate(training.model, 10 * config.eval_tokens)
            if last:
                log.held_out(step, found, last=True)
        if hooks.sample and samples:
            log.sample(step, hooks.sample(training.model))


def hooks_on(data: Packed | Mixture, length: int, config: TrainConfig, *, carry: bool, decodes: bool) -> Hooks:
    """Hooks with evaluation if the data hold out text, and samples if the model can decode.

    Args:
        length: tokens of an evaluated row.
        carry: evaluate rows that carry their state on, as mode "carry" trains them.
    """

    def evaluate(model: LanguageModel, tokens: int) -> HeldOut:
        if isinstance(data, Mixture):
            return mixture_loss(model, data, tokens=tokens, length=length, carry=carry)
        return held_out_loss(model, data, tokens=tokens, length=length, carry=carry)

    def sample(model: LanguageModel) -> str:
        asked = config.sample_prompt
        if data.template is None:
            return sample_text(model, data.tokenizer, asked)
        if asked:
            return sample_answer(model, data.template, data.template.first([{"role": "user", "content": asked}]))
        return sample_answer(model, data.template, *data.first_question())

    return Hooks(evaluate if data.holds_out(length) else None, sample if decodes else None)
