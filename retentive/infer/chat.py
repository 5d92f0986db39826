"""A conversation in one object: its engine, its sampling, and a memory of constant size.

with Chat(model, tokenizer, template) as chat:
    print(chat("Who is there?"))
"""

from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from retentive.data.media import Media
from retentive.data.templates import ChatTemplate
from retentive.data.tokenizer import Tokenizer
from retentive.infer.conversation import Conversation
from retentive.infer.engine import Engine
from retentive.infer.memory import Memory, blank, load_memory, save
from retentive.infer.sample import SamplingParams
from retentive.models import LanguageModel
from retentive.sampling import TEXT


class Chat:
    """A conversation with a model: `chat(message)` returns the answer, `chat.stream(message)` yields its pieces.

    Close it, or use it in a `with` block: its engine is a thread.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        memory: Memory | str | Path | None = None,
        max_tokens: int = 400,
        sampling: SamplingParams = TEXT,
    ):
        """Begins a conversation.

        Args:
            memory: memory to start from, or a file of `save` or of `retentive memory write`.
            max_tokens: maximum tokens of an answer.

        Raises:
            ValueError: the memory is of another model.
        """
        if memory is None:
            memory = blank(model)
        elif not isinstance(memory, Memory):
            memory = load_memory(memory, model)
        self.engine = Engine(model, slots=1).start()
        self.conversation = Conversation(self.engine, tokenizer, template, memory)
        self.max_tokens, self.sampling = max_tokens, sampling

    def __call__(self, message: str | Sequence[str | Media]) -> str:
        """Returns the answer to a message: text, or a list of texts and `Media`; raises as `Conversation.say`."""
        return "".join(self.stream(message))

    def stream(self, message: str | Sequence[str | Media]) -> Generator[str, None, None]:
        """Yields the answer in pieces, as they are made. A caller that stops early keeps the answer so far."""
        with closing(self.conversation.say(message, self.sampling, max_tokens=self.max_tokens)) as pieces:
            yield from pieces

    @property
    def memory(self) -> Memory:
        """Everything that was said and read."""
        return self.conversation.memory

    def save(self, path: str | Path) -> None:
        """Writes the memory to a file."""
        save(self.memory, path)

    def close(self) -> None:
        """Ends the engine."""
        self.engine.close(drain=False)

    def __enter__(self) -> "Chat":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()
