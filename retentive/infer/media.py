"""Questions about pictures and sound, and memories of them.

answer(model, template, [picture, "What is it?"])      the text in pieces
state = read(model, ids, rows)                         the state after them, to score continuations
remember(model, template, files)                       a memory of files, even hours long, for many questions
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retentive.data.media import SUFFIXES, Media, Rows, rows_of
from retentive.data.templates import ChatTemplate
from retentive.files import file_sha256
from retentive.infer.generate import checked, generate, prefill
from retentive.infer.memory import Memory, blank
from retentive.infer.sample import SamplingParams
from retentive.infer.text import from_the_first_word, stream_text
from retentive.models import LanguageModel
from retentive.models.encoders import encoders_of


def read(model: LanguageModel, ids: Sequence[int], rows: Rows, state: Any = None) -> Any:
    """Read ids, which may be empty and hold a placeholder for each of the rows; returns the state after them.

    Args:
        state: state before the ids; consumed. None begins afresh.

    Raises:
        ValueError: as `prefill`.
    """
    if not ids:
        return model.init_state(1) if state is None else state
    return prefill(model, checked(model, ids, rows), state, rows=rows)[1]


def answer(
    model: LanguageModel,
    template: ChatTemplate,
    content: str | Sequence[str | Media],
    params: SamplingParams | None = None,
    *,
    max_tokens: int | None = None,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """The model's answer to a user's message, in pieces, without leading space.

    Args:
        content: texts and media in order (`multimodal.Opener` opens files).
        stop: strings that end the answer, in addition to the template's own.

    Raises:
        ValueError: as `generate`, or the template refuses the message.
    """
    messages = [{"role": "user", "content": content}]
    ids, rows = template.first(messages), rows_of(messages)
    return answer_to(model, template, ids, None, params, rows=rows, max_tokens=max_tokens, stop=stop)


def answer_to(
    model: LanguageModel,
    template: ChatTemplate,
    ids: Sequence[int],
    state: Any,
    params: SamplingParams | None = None,
    *,
    rows: Rows | None = None,
    max_tokens: int | None = None,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """Same as `answer`, for a question encoded as `ids` after `state`, which is consumed.

    Args:
        rows: rows of the placeholders among the ids.
    """
    stop_ids = sorted(template.stop_ids)
    tokens = generate(model, ids, params, rows=rows, max_tokens=max_tokens, stop_ids=stop_ids, state=state)
    return from_the_first_word(stream_text(tokens, template.tokenizer, stop=[*template.stop, *stop]))


def remember(
    model: LanguageModel,
    template: ChatTemplate,
    files: Sequence[str | Path],
    *,
    progress: Callable[[int], object] = lambda tokens: None,
) -> Memory:
    """Read pictures and sound into a memory, as the beginning of a user's message; `asked` gives the rest of it.

    Args:
        files: files with suffixes of data.media.SUFFIXES, in order; sound is loaded some seconds at a time.
        progress: called with the tokens read so far.

    Raises:
        ValueError, OSError: no files, a file that is no picture or sound, or one that the model cannot read.
        ImportError: the extra `multimodal` is not installed.
    """
    from retentive.multimodal.prepare import Opener  # an extra

    kinds = [SUFFIXES.get(Path(file).suffix.lower(), "") for file in files]
    if not all(kinds) or not files:
        which = files[kinds.index("")] if files else "nothing"
        raise ValueError(f"{which} is no picture or sound: a memory is of these, or of text")
    opener, memory = Opener.of(model), blank(model)
    state: Any = memory.state
    tokens = 0
    for file, kind in zip(files, kinds, strict=True):
        read_before = tokens
        for part in opener.parts(kind, Path(file)):
            token = encoders_of(model)[kind].config.token
            before = [] if tokens else _around(template, kind, encoders_of(model)[kind].config, "")[0]
            ids = [*before, *[token] * len(part.rows)]
            state = read(model, ids, {kind: part.rows}, state)
            tokens += len(ids)
            read_before += len(before)
            progress(tokens)
        source = {"name": str(file), "kind": kind, "sha256": file_sha256(Path(file)), "tokens": tokens - read_before}
        memory.sources.append(source)
    return Memory(state, [], tokens, memory.model, memory.sources, memory.config)


def asked(model: LanguageModel, template: ChatTemplate, memory: Memory, question: str) -> list[int]:
    """Ids to read after a memory made by `remember`, for a question about it.

    If a conversation has continued from the memory, the question is its next message.
    """
    kind = next(source["kind"] for source in reversed(memory.sources) if "kind" in source)  # text may have followed
    before, after = _around(template, kind, encoders_of(model)[kind].config, question)
    shown = sum(source["tokens"] for source in memory.sources)
    if memory.pending or memory.tokens > shown + len(before) * len(memory.sources):
        after = template.next([{"role": "user", "content": question}])
    return [*memory.pending, *after]


def _around(template: ChatTemplate, kind: str, config: Any, question: str) -> tuple[list[int], list[int]]:
    """(ids of a message before its picture or sound, ids after it, with a question)."""
    one = Media(kind, np.zeros((1, config.features), np.uint8))
    ids = template.first([{"role": "user", "content": [one, question]}])
    at = ids.index(config.token)
    return ids[:at], ids[at + 1 :]
