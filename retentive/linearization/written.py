"""Conversations that a teacher writes by itself: a question where its chat template expects one, then its answer.

Source: Magpie, arXiv 2406.08464.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from retentive.checkpoint import ModelFolder
from retentive.data.prepare import Progress
from retentive.data.templates import ChatTemplate
from retentive.files import write_json, write_text
from retentive.infer.engine import Engine
from retentive.infer.sample import SamplingParams
from retentive.native import with_engine

TOGETHER = 32
"""Conversations that are written at once."""
LONGEST = {"user": 128, "assistant": 512}
"""Maximum tokens of a message by its role. Longer ones are left out, since they have no end."""
DRAWN = {"user": SamplingParams(temperature=1.0, top_p=0.95), "assistant": SamplingParams(temperature=0.7, top_p=0.95)}
"""Sampling by role: questions of all kinds, and answers that the teacher is sure of."""
TRIES = 20
"""Rounds without a conversation after which a teacher counts as unable to write any."""


def write_chats(
    teacher: ModelFolder,
    file: Path,
    tokens: int,
    *,
    questions: Sequence[str] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> int:
    """Writes conversations of one question and one answer, until they have `tokens` tokens; returns their number.

    Stopped and called again, it goes on: after each round, all that is written so far is kept beside `file`.

    Args:
        file: .jsonl file to write, one conversation a line. It appears when all are written.
        questions: asked in turn, from the beginning again after the last, in place of questions that it writes itself.
        progress: called with what is done, the tokens so far, and `tokens`.

    Raises:
        ValueError: the teacher has no tokenizer, or ends none of its messages.
    """
    tokenizer = teacher.tokenizer_for_text()
    template = teacher.template(tokenizer)
    engine = Engine(with_engine(teacher.model()), slots=TOGETHER)
    begin, kept, empty = before_question(template), file.with_suffix(".partial.json"), 0
    made: dict[str, Any] = {"rounds": 0, "tokens": 0, "lines": []}
    if kept.is_file():
        made = json.loads(kept.read_text(encoding="utf-8"))
    while made["tokens"] < tokens:
        seeds = count(seed * 1_000_003 + 2 * TOGETHER * made["rounds"])
        if questions:
            asked = [questions[(TOGETHER * made["rounds"] + n) % len(questions)] for n in range(TOGETHER)]
        else:
            own = answers(engine, template, [begin] * TOGETHER, "user", seeds)
            asked = [text for text in (tokenizer.decode(ids).strip() for ids in own) if text]
        said = [[{"role": "user", "content": text}] for text in asked]
        prompts, before = [template.first(messages) for messages in said], len(made["lines"])
        for messages, prompt, answer in zip(
            said, prompts, answers(engine, template, prompts, "assistant", seeds), strict=True
        ):
            if answer:
                messages.append({"role": "assistant", "content": tokenizer.decode(answer).strip()})
                made["lines"].append(json.dumps({"messages": messages}, ensure_ascii=False))
                made["tokens"] += len(prompt) + len(answer)
        empty = 0 if len(made["lines"]) > before else empty + 1
        if empty == TRIES:
            raise ValueError(f"{teacher.name} ends none of the messages that it writes: leave out `from_teacher`")
        made["rounds"] += 1
        write_json(kept, made)
        if progress:
            progress("writing conversations", min(made["tokens"], tokens), tokens)
    write_text(file, "".join(line + "\n" for line in made["lines"]))
    kept.unlink()
    return len(made["lines"])


def before_question(template: ChatTemplate) -> list[int]:
    """Returns the ids of a conversation before its first question: those that two questions have in common."""
    one, other = (template.first([{"role": "user", "content": text}]) for text in ("A", "7"))
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]


def answers(
    engine: Engine, template: ChatTemplate, prompts: Sequence[list[int]], role: str, seeds: Iterator[int]
) -> list[list[int]]:
    """Returns what the model writes after each prompt, as ids; [] for a text that it did not end."""
    stops = sorted(template.stop_ids)
    streams = [
        engine.submit(ids, replace(DRAWN[role], seed=seed), max_tokens=LONGEST[role], stop_ids=stops)[0]
        for ids, seed in zip(prompts, seeds)  # noqa: B905 (the seeds are endless)
    ]
    while engine.step():
        pass
    return [[token.id for token in s] if s.reason == "stop" else [] for s in streams]
