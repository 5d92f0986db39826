"""Reading ids with pictures and sound among them into a state, in prefill chunks; from there on all is text.

state = read(model, ids[:-1], rows)                    then generate(model, ids[-1:], state=state), or the engine
answer(model, template, [picture, "What is it?"])      the text in pieces
remember(model, template, files)                       a memory of them, hours long perhaps, to be asked many times
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retentive.data.media import SUFFIXES, Media, media_of
from retentive.data.templates import ChatTemplate
from retentive.files import file_sha256
from retentive.infer.generate import generate
from retentive.infer.memory import Memory, blank
from retentive.infer.sample import SamplingParams
from retentive.infer.text import from_the_first_word, stream_text
from retentive.models import LanguageModel
from retentive.models.encoders import ImageConfig, encoders_of, hidden

CHUNK = 4096
"""Tokens that go through the model at once, and the rest of a picture."""

Rows = Mapping[str, np.ndarray]
"""For each kind the rows `[n, features]` of its placeholders among some ids, in order."""


def rows_of(messages: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The rows of all media of messages, by kind; nothing where they hold text alone."""
    found: dict[str, list[np.ndarray]] = {}
    for media in media_of(messages):
        found.setdefault(media.kind, []).append(media.rows)
    return {kind: np.concatenate(rows) for kind, rows in found.items()}


def seen_first(model: LanguageModel, ids: Sequence[int]) -> int:
    """How many of the ids come up to the last placeholder among them, with it; they are what `read` must read."""
    tokens = {encoder.config.token for encoder in encoders_of(model).values()}
    return max((n for n, id in enumerate(ids, 1) if id in tokens), default=0)


@torch.no_grad()
def read(
    model: LanguageModel, ids: Sequence[int], rows: Rows, state: Any = None, *, chunk: int = CHUNK,
    still_wanted: Callable[[], object] = lambda: None,
) -> Any:  # fmt: skip
    """The state after ids, a placeholder for each of the rows among them.

    Args:
        state: what the model has read before; used up.
        still_wanted: called before each chunk; what it raises ends the reading.

    Raises:
        ValueError: no ids, a kind that the model has no encoder for, another number of rows than of placeholders.
    """
    if not ids:
        raise ValueError("nothing to read")
    tokens = {kind: encoder.config.token for kind, encoder in encoders_of(model).items()}
    if unknown := sorted(set(rows) - set(tokens)):
        raise ValueError(f"the model has no encoder for {unknown[0]}: it was trained without any")
    for kind, token in tokens.items():  # before anything is read
        count, given = list(ids).count(token), len(rows[kind]) if kind in rows else 0
        if count != given:
            raise ValueError(f"{count} placeholders of {kind} and {given} rows: each takes one")
    taken = dict.fromkeys(rows, 0)
    for begin, end in _spans(model, ids, chunk):
        still_wanted()
        part, here = ids[begin:end], {}
        for kind, of_kind in rows.items():
            count = list(part).count(tokens[kind])
            here[kind] = torch.from_numpy(of_kind[taken[kind] : taken[kind] + count]).to(model.device)
            taken[kind] += count
        state = hidden(model, torch.tensor([part], device=model.device), state, rows=here)[1]
    return state


def answer(
    model: LanguageModel,
    template: ChatTemplate,
    content: str | Sequence[str | Media],
    params: SamplingParams | None = None,
    *,
    max_tokens: int | None = None,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """What the model answers to a user's message, in pieces, without space before it.

    Args:
        content: texts and media in order (`multimodal.Opener` opens files).
        stop: strings that end the answer, beside the template's own.

    Raises:
        ValueError: as `read`; the template refuses the message.
    """
    messages = [{"role": "user", "content": content}]
    ids = template.first(messages)
    state = read(model, ids[:-1], rows_of(messages)) if len(ids) > 1 else None
    return answer_to(model, template, ids[-1:], state, params, max_tokens=max_tokens, stop=stop)


def answer_to(
    model: LanguageModel,
    template: ChatTemplate,
    ids: Sequence[int],
    state: Any,
    params: SamplingParams | None = None,
    *,
    max_tokens: int | None = None,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """As `answer`, to the question that ends with these ids; `state` has read what comes before, and is used up."""
    stop_ids = sorted(template.stop_ids)
    tokens = generate(model, ids, params, max_tokens=max_tokens, stop_ids=stop_ids, state=state)
    return from_the_first_word(stream_text(tokens, template.tokenizer, stop=[*template.stop, *stop]))


def remember(
    model: LanguageModel,
    template: ChatTemplate,
    files: Sequence[str | Path],
    *,
    progress: Callable[[int], object] = lambda tokens: None,
) -> Memory:
    """A memory of pictures and sounds, as a user's message begins with them; `asked` is what follows in it.

    Args:
        files: of data.media.SUFFIXES, read in this order; of a sound only some seconds are in memory at a time.
        progress: called with the tokens read so far.

    Raises:
        ValueError, OSError: no files, a file that is no picture or sound, or one that the model does not take.
        ImportError: without the extra `multimodal`.
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
    """The ids to read after a memory that `remember` has made, for a question about what is in it.

    Where a conversation has gone on from it, the question is its next message.
    """
    kind = next(source["kind"] for source in reversed(memory.sources) if "kind" in source)  # text may have followed
    before, after = _around(template, kind, encoders_of(model)[kind].config, question)
    shown = sum(source["tokens"] for source in memory.sources)
    if memory.pending or memory.tokens > shown + len(before) * len(memory.sources):
        after = template.next([{"role": "user", "content": question}])
    return [*memory.pending, *after]


def _around(template: ChatTemplate, kind: str, config: Any, question: str) -> tuple[list[int], list[int]]:
    """The ids of a message before its picture or sound, and those after it, with a question."""
    one = Media(kind, np.zeros((1, config.features), np.uint8))
    ids = template.first([{"role": "user", "content": [one, question]}])
    at = ids.index(config.token)
    return ids[:at], ids[at + 1 :]


def _spans(model: LanguageModel, ids: Sequence[int], chunk: int) -> Iterator[tuple[int, int]]:
    """Where chunks begin and end: none within a picture, which is encoded whole."""
    pictures = [e.config for e in encoders_of(model).values() if isinstance(e.config, ImageConfig)]
    begin = 0
    while begin < len(ids):
        end = min(begin + chunk, len(ids))
        for config in pictures:
            if end < len(ids) and ids[end] == ids[end - 1] == config.token:
                first = end - 1  # of the run of placeholders, which may be of several pictures
                while first and ids[first - 1] == config.token:
                    first -= 1
                end += -(end - first) % config.tokens
        yield begin, end
        begin = end
