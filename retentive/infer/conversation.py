"""A conversation with a model, and what is remembered of it: a state of constant size, whatever was said.

    conversation = Conversation(engine, tokenizer, template, blank(model))
    for piece in conversation.say("Who is there?", max_tokens=400):
        print(piece, end="")
    save(conversation.memory, "tea.safetensors")

The terminal talks with it through `say`; the server, which answers many at once, asks for the ids to read (`turn`,
`lead`), submits them, and has the end remembered (`remember`, `put_off`).
"""

from collections import deque
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from retentive.data.templates import ChatTemplate
from retentive.data.tokenizer import Tokenizer
from retentive.infer.engine import Engine
from retentive.infer.memory import Memory
from retentive.infer.requests import Returns, Stream
from retentive.infer.sample import SamplingParams
from retentive.infer.text import Text

NAME = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$"
"""Of a saved conversation, wherever people choose one: nothing that a path could be made of."""


class Conversation:
    """What a model remembers of one conversation, and how it goes on.

    `memory` is replaced after every answer and never written to: many may begin from the same one.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, template: ChatTemplate, memory: Memory):
        self.engine, self.tokenizer, self.template, self.memory = engine, tokenizer, template, memory
        self.made = 0
        """Tokens of the last answer of `say`."""

    @property
    def begun(self) -> bool:
        """Whether anything was said: what comes next then goes on from it."""
        return bool(self.memory.tokens or self.memory.pending)

    @property
    def nbytes(self) -> int:
        """What remembering it takes, above the blank state that all share."""
        return (self.memory.nbytes if self.memory.tokens else 0) + 8 * len(self.memory.pending)

    # what is to be read

    def turn(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids to read for `messages`, after those that are pending.

        Raises:
            ValueError: the template refuses these messages.
        """
        encode = self.template.next if self.begun else self.template.first
        return [*self.memory.pending, *encode(messages)]

    @property
    def lead(self) -> list[int]:
        """What is read before a text that goes on: the pending ids, or the end of text after which documents begin."""
        return list(self.memory.pending) if self.begun else [self.tokenizer.eos_id]

    def submit(self, ids: Sequence[int], params: SamplingParams | None = None, **options: Any) -> list[Stream]:
        """Streams of tokens after `ids`, from what is remembered: see `Engine.submit`."""
        # one that has read nothing may begin from a cached state
        state = self.memory.state if self.memory.tokens else None
        return self.engine.submit(ids, params, state=state, **options)

    # what is remembered

    def remember(self, stream: Stream, pending: Sequence[int]) -> None:
        """The state that a stream (with `Returns.state`) has left at its end.

        Args:
            pending: those of `stream.pending` that belong to the conversation: not the end of an answer, which the
                template writes.
        """
        old, state = self.memory, stream.state
        assert state is not None
        read = int(state.position[0] - old.state.position[0])
        self.memory = Memory(state, list(pending), old.tokens + read, old.model, old.sources, old.config)

    def put_off(self, ids: Sequence[int]) -> None:
        """The state as it was; `ids`, pending ones and all, are read with whatever comes next."""
        old = self.memory
        self.memory = Memory(old.state, list(ids), old.tokens, old.model, old.sources, old.config)

    # one answer after the other

    def say(self, message: str, params: SamplingParams | None = None, *, max_tokens: int) -> Generator[str, None, None]:
        """The answer in pieces, as it comes. Whoever stops reading it, stops it; what came so far is remembered.

        Raises:
            ValueError: the template refuses the message.
        """
        ids = self.turn([{"role": "user", "content": message}])
        stop_ids = self.template.stop_ids
        [stream] = self.submit(
            ids, params, max_tokens=max_tokens, stop_ids=sorted(stop_ids), returns=Returns(state=True)
        )
        text, whole = Text(self.tokenizer, self.template.stop), False
        self.made = 0
        try:
            for token in stream:
                self.made += 1
                if piece := text.push(token.id):
                    yield piece
                if text.stopped:
                    break
            else:
                whole = True
                if piece := text.flush():
                    yield piece
        finally:
            _end(stream)
            if whole and stream.state is not None:
                self.remember(stream, [id for id in stream.pending if id not in stop_ids])
            elif stream.reason != "error":  # the state has read more than was given out, or not all of it
                self.put_off([*ids, *text.kept_ids()])


def _end(stream: Stream) -> None:
    """Wait until the engine has let the stream go."""
    if stream.reason is None:
        stream.cancel()
        deque(stream, maxlen=0)
