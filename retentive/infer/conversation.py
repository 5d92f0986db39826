"""A conversation with a model, remembered in a state of constant size, however much was said.

    conversation = Conversation(engine, tokenizer, template, blank(model))
    for piece in conversation.say("Who is there?", max_tokens=400):
        print(piece, end="")
    save(conversation.memory, "tea.safetensors")

The terminal uses `say`. The server, which answers many at once, asks for the ids to read (`turn`, `lead`), submits
them, and at the end calls `remember`, or `put_off` if the stream's state has read more than the client was given.
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any

from retentive.data.templates import ChatTemplate, Message
from retentive.data.tokenizer import Tokenizer
from retentive.infer.engine import Engine
from retentive.infer.media import read, rows_of, seen_first
from retentive.infer.memory import Memory
from retentive.infer.requests import Returns, Stream
from retentive.infer.sample import SamplingParams
from retentive.infer.text import Text

NAME = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$"
"""What a saved conversation may be called. It becomes a file name, so no slash and no leading dot."""


class TooLong(ValueError):
    """More is to be read than may be."""


class Conversation:
    """One conversation: a memory, and how the next messages go on from it.

    `memory` is replaced after every answer and never written to, so that many conversations may share one.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, template: ChatTemplate, memory: Memory):
        self.engine, self.tokenizer, self.template, self.memory = engine, tokenizer, template, memory
        self.seen: Memory | None = None
        """What the turn under way goes on from, where it has pictures or sound: `memory`, and all up to the last."""
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

    def turn(
        self,
        messages: Sequence[Message],
        *,
        most: int | None = None,
        still_wanted: Callable[[], object] = lambda: None,
    ) -> list[int]:
        """The ids to read for `messages`, the pending ones first.

        Where these hold pictures or sound, all up to the last of them is read now, which takes its time; the ids are
        those that come after. `memory` stays as it is until the answer has ended.

        Args:
            most: of ids, placeholders included, where something is read now.
            still_wanted: called now and then while it is; what it raises ends that.

        Raises:
            TooLong: there are more ids.
            ValueError: the template refuses these messages; the model does not see, or hear.
        """
        self.give_up()
        encode, old = (self.template.next if self.begun else self.template.first), self.memory
        ids, rows = [*old.pending, *encode(messages)], rows_of(messages)
        if not rows:
            return ids
        if most is not None and len(ids) > most:
            raise TooLong(f"the messages have {len(ids)} tokens, at most {most} are read")
        model = self.engine.model
        count = seen_first(model, ids)
        state = read(model, ids[:count], rows, old.state.clone(), still_wanted=still_wanted)
        self.seen = Memory(state, [], old.tokens + count, old.model, old.sources, old.config)
        return ids[count:]

    @property
    def lead(self) -> list[int]:
        """The ids to read before a plain text: the pending ones, or the end-of-text token that begins a document."""
        return list(self.memory.pending) if self.begun else [self.tokenizer.eos_id]

    def submit(self, ids: Sequence[int], params: SamplingParams | None = None, **options: Any) -> list[Stream]:
        """Streams of tokens after `ids`, going on from the memory; options as for `Engine.submit`."""
        # With nothing read yet no state is passed: the engine then may begin from its prefix cache.
        memory = self.seen or self.memory
        state = memory.state if memory.tokens else None
        return self.engine.submit(ids, params, state=state, **options)

    # what is remembered

    def remember(self, stream: Stream, pending: Sequence[int]) -> None:
        """Takes over the state that a finished stream (with `Returns.state`) has left.

        Args:
            pending: those of `stream.pending` that belong to the conversation. A stop token does not: the template
                writes the end of an answer itself, before the next message.
        """
        old, state = self.seen or self.memory, stream.state
        assert state is not None
        more = int(state.position[0] - old.state.position[0])
        self.memory = Memory(state, list(pending), old.tokens + more, old.model, old.sources, old.config)
        self.seen = None

    def give_up(self) -> None:
        """Leaves the conversation as it was before the turn under way, which has no answer."""
        self.seen = None

    def put_off(self, ids: Sequence[int]) -> None:
        """Keeps the state from which `ids` (with the pending ones) were read: they are pending for the next turn."""
        old = self.seen or self.memory
        self.memory = Memory(old.state, list(ids), old.tokens, old.model, old.sources, old.config)
        self.seen = None

    # one answer after the other

    def say(self, message: Any, params: SamplingParams | None = None, *, max_tokens: int) -> Generator[str, None, None]:
        """The answer in pieces, as it comes. Closing the generator stops it, and what came so far is remembered.

        Args:
            message: text, or a list of texts and `Media`.

        Raises:
            ValueError: as `turn`.
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
        finally:  # also when the caller closes the generator, or Ctrl-C is pressed while it waits for a token
            _end(stream)
            if whole and stream.state is not None:
                self.remember(stream, [id for id in stream.pending if id not in stop_ids])
            elif stream.reason != "error":  # the state has read more than was given out: keep the ids, not the state
                self.put_off([*ids, *text.kept_ids()])
            else:
                self.give_up()


def _end(stream: Stream) -> None:
    """Cancel the stream if it still runs, and wait until the engine has ended it: its state is final only then."""
    if stream.reason is None:
        stream.cancel()
        deque(stream, maxlen=0)
