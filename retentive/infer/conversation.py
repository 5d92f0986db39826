"""A conversation with a model, remembered in a state of constant size at any length.

    conversation = Conversation(engine, tokenizer, template, blank(model))
    for piece in conversation.say("Who is there?", max_tokens=400):
        print(piece, end="")
    save(conversation.memory, "tea.safetensors")

The terminal uses `say`. The server, which answers many at once, gets the ids to read (`turn`, `lead`) and submits
them. At the end it calls `remember`, or `cut` if the stream's state has read more than the client received.
"""

from collections import deque
from collections.abc import Generator, Sequence
from typing import Any

from retentive.data.media import Rows, rows_of
from retentive.data.templates import ChatTemplate, Message, Tool
from retentive.data.tokenizer import Tokenizer
from retentive.infer.engine import Engine
from retentive.infer.memory import Memory
from retentive.infer.requests import Returns, Stream
from retentive.infer.sample import SamplingParams
from retentive.infer.text import Text
from retentive.models.state import State

NAME = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$"
"""Pattern of a saved conversation's name. It becomes a file name, so no slash and no leading dot."""


class Conversation:
    """One conversation: a memory, and the encoding of the next messages after it.

    `memory` is replaced after every answer and never written to, so many conversations may share one.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, template: ChatTemplate, memory: Memory):
        self.engine, self.tokenizer, self.template, self.memory = engine, tokenizer, template, memory
        self.made = 0
        """Tokens of the last answer of `say`."""

    @property
    def begun(self) -> bool:
        """True if anything was said or read; the next messages are then encoded as a continuation."""
        return bool(self.memory.tokens or self.memory.pending)

    @property
    def nbytes(self) -> int:
        """Bytes of the conversation's memory, beyond the blank state that all conversations share."""
        return (self.memory.nbytes if self.memory.tokens else 0) + 8 * len(self.memory.pending)

    # what is to be read

    def turn(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> tuple[list[int], Rows]:
        """Encode messages: returns (ids to read, pending ones first; rows of the pictures and sound among them).

        Args:
            tools: functions that the model may call. Only the first messages of a conversation introduce them.

        Raises:
            ValueError: the template refuses these messages.
        """
        ids = self.template.next(messages) if self.begun else self.template.first(messages, tools)
        return [*self.memory.pending, *ids], rows_of(messages)

    @property
    def lead(self) -> list[int]:
        """Ids to read before a plain text: the pending ones, or the end-of-text token that begins a document."""
        return list(self.memory.pending) if self.begun else [self.tokenizer.eos_id]

    def submit(self, ids: Sequence[int], params: SamplingParams | None = None, **options: Any) -> list[Stream]:
        """Submit `ids` after the memory; returns streams of tokens. Options as for `Engine.submit`."""
        # Before anything is read, no state is passed, so that the engine can use its prefix cache.
        state = self.memory.state if self.memory.tokens else None
        return self.engine.submit(ids, params, state=state, **options)

    # what is remembered

    def remember(self, stream: Stream, pending: Sequence[int]) -> None:
        """Take over the final state of a finished stream (with `Returns.state`).

        Args:
            pending: tokens of `stream.pending` that belong to the conversation. A stop token does not: the template
                itself writes the end of an answer before the next message.
        """
        assert stream.state is not None
        self._go_on(stream.state, pending)

    def cut(self, stream: Stream, kept: Sequence[int]) -> None:
        """Remember an answer cut after the tokens `kept`, although the stream's state has read beyond them."""
        if stream.prompt_state is None:
            self.put_off([*stream.ids, *kept])
        else:  # pictures and sound are not in the ids
            self._go_on(stream.prompt_state, [stream.ids[-1], *kept])

    def put_off(self, ids: Sequence[int]) -> None:
        """Keep the state from before `ids` (which include the pending ones): they are pending for the next turn."""
        self._go_on(self.memory.state, ids)

    def _go_on(self, state: State, pending: Sequence[int]) -> None:
        old = self.memory
        more = int(state.position[0] - old.state.position[0])
        self.memory = Memory(state, list(pending), old.tokens + more, old.model, old.sources, old.config)

    # one answer after the other

    def say(self, message: Any, params: SamplingParams | None = None, *, max_tokens: int) -> Generator[str, None, None]:
        """Answer a message in pieces, as they are made. Closing the generator keeps the answer so far.

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
    """Cancel the stream if it still runs, and wait until the engine has ended it. Only then is its state final."""
    if stream.reason is None:
        stream.cancel()
        deque(stream, maxlen=0)
