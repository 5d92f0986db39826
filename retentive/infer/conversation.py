"""A conversation with a model, remembered in a state of constant size, however much was said.

    conversation = Conversation(engine, tokenizer, template, blank(model))
    for piece in conversation.say("Who is there?", max_tokens=400):
        print(piece, end="")
    save(conversation.memory, "tea.safetensors")

The terminal uses `say`. The server, which answers many at once, asks for the ids to read (`turn`, `lead`), submits
them, and at the end calls `remember`, or `cut` if the stream's state has read more than the client was given.
"""

from collections import deque
from collections.abc import Generator, Sequence
from typing import Any

from retentive.data.media import Rows, rows_of
from retentive.data.templates import ChatTemplate, Message
from retentive.data.tokenizer import Tokenizer
from retentive.infer.engine import Engine
from retentive.infer.memory import Memory
from retentive.infer.requests import Returns, Stream
from retentive.infer.sample import SamplingParams
from retentive.infer.text import Text
from retentive.models.state import State

NAME = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$"
"""What a saved conversation may be called. It becomes a file name, so no slash and no leading dot."""


class Conversation:
    """One conversation: a memory, and how the next messages go on from it.

    `memory` is replaced after every answer and never written to, so that many conversations may share one.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, template: ChatTemplate, memory: Memory):
        self.engine, self.tokenizer, self.template, self.memory = engine, tokenizer, template, memory
        self.made = 0
        """Tokens of the last answer of `say`."""

    @property
    def begun(self) -> bool:
        """Whether anything was said or read; the next messages are then encoded as a continuation."""
        return bool(self.memory.tokens or self.memory.pending)

    @property
    def nbytes(self) -> int:
        """Bytes that remembering it takes, beyond the blank state that all conversations share."""
        return (self.memory.nbytes if self.memory.tokens else 0) + 8 * len(self.memory.pending)

    # what is to be read

    def turn(self, messages: Sequence[Message]) -> tuple[list[int], Rows]:
        """Returns (the ids to read for `messages`, the pending ones first; the rows of pictures and sound among them).

        Raises:
            ValueError: the template refuses these messages.
        """
        encode = self.template.next if self.begun else self.template.first
        return [*self.memory.pending, *encode(messages)], rows_of(messages)

    @property
    def lead(self) -> list[int]:
        """The ids to read before a plain text: the pending ones, or the end-of-text token that begins a document."""
        return list(self.memory.pending) if self.begun else [self.tokenizer.eos_id]

    def submit(self, ids: Sequence[int], params: SamplingParams | None = None, **options: Any) -> list[Stream]:
        """Streams of tokens after `ids`, going on from the memory; options as for `Engine.submit`."""
        # With nothing read yet no state is passed: the engine then may begin from its prefix cache.
        state = self.memory.state if self.memory.tokens else None
        return self.engine.submit(ids, params, state=state, **options)

    # what is remembered

    def remember(self, stream: Stream, pending: Sequence[int]) -> None:
        """Takes over the state that a finished stream (with `Returns.state`) has left.

        Args:
            pending: those of `stream.pending` that belong to the conversation. A stop token does not: the template
                writes the end of an answer itself, before the next message.
        """
        assert stream.state is not None
        self._go_on(stream.state, pending)

    def cut(self, stream: Stream, kept: Sequence[int]) -> None:
        """Remembers an answer that was cut after the tokens `kept`, beyond which the stream's state has read."""
        if stream.prompt_state is None:
            self.put_off([*stream.ids, *kept])
        else:  # pictures and sound are not in the ids
            self._go_on(stream.prompt_state, [stream.ids[-1], *kept])

    def put_off(self, ids: Sequence[int]) -> None:
        """Keeps the state from which `ids` (with the pending ones) were read: they are pending for the next turn."""
        self._go_on(self.memory.state, ids)

    def _go_on(self, state: State, pending: Sequence[int]) -> None:
        old = self.memory
        more = int(state.position[0] - old.state.position[0])
        self.memory = Memory(state, list(pending), old.tokens + more, old.model, old.sources, old.config)

    # one answer after the other

    def say(self, message: Any, params: SamplingParams | None = None, *, max_tokens: int) -> Generator[str, None, None]:
        """The answer in pieces, as it comes. Closing the generator stops it, and what came so far is remembered.

        Args:
            message: text, or a list of texts and `Media`.

        Raises:
            ValueError: as `turn` and `Engine.submit`.
        """
        ids, rows = self.turn([{"role": "user", "content": message}])
        stop_ids = self.template.stop_ids
        [stream] = self.submit(
            ids, params, rows=rows, max_tokens=max_tokens, stop_ids=sorted(stop_ids), returns=Returns(state=True)
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
        finally:  # also when the caller closes the generator, or Ctrl-C is pressed while it waits for a token
            _end(stream)
            if whole and stream.state is not None:
                self.remember(stream, [id for id in stream.pending if id not in stop_ids])
            elif stream.reason != "error" and not (rows and stream.prompt_state is None):
                self.cut(stream, text.kept_ids())  # pictures and sound that were not read yet are forgotten


def _end(stream: Stream) -> None:
    """Cancel the stream if it still runs, and wait until the engine has ended it: its state is final only then."""
    if stream.reason is None:
        stream.cancel()
        deque(stream, maxlen=0)
