"""`retentive chat`: a conversation in the terminal.

All that was said lives in a state of constant size, which can be saved, and gone on from another day. Messages become
text by the server's templates; the engine reads it, so that an answer can be stopped at any token.
"""

import re
import sys
import time
from collections import deque
from collections.abc import Generator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from retentive.checkpoint.io import find
from retentive.cli.info import megabytes
from retentive.cli.loading import Loading
from retentive.data.templates import ChatTemplate, load_template
from retentive.data.tokenizer import Tokenizer
from retentive.infer import SamplingParams
from retentive.infer.engine import Engine, Stream
from retentive.infer.generate import Text
from retentive.infer.memory import Memory, blank, load_memory, save
from retentive.infer.requests import Returns
from retentive.serve.options import NAME

HELP = """\
/save NAME   keep all that was said and read in a file
/load NAME   go on from such a file
/forget      begin anew
/stats       how much was read, and what remembering it takes
Ctrl-C stops an answer, Ctrl-D leaves. A message that begins with / takes a space before it."""


@dataclass(frozen=True, kw_only=True)
class ChatCommand(Loading):
    """Talk with a model. It remembers all that was said in a state that does not grow; /help tells the commands."""

    memory: Path | None = None
    """What it has read before: a file of /save or of `retentive memory write`."""
    states: Path = Path("states")
    """Folder of /save and /load."""
    template: Path | None = None
    """A chat template (jinja2) in place of the model's own."""
    max_tokens: int = 400
    """Tokens of an answer at most."""
    sampling: Annotated[SamplingParams, tyro.conf.arg(name="")] = field(
        default_factory=lambda: SamplingParams(temperature=0.8, top_p=0.95)
    )


@dataclass
class Conversation:
    """A model, and what it remembers of one conversation."""

    engine: Engine
    tokenizer: Tokenizer
    template: ChatTemplate
    sampling: SamplingParams
    max_tokens: int
    memory: Memory
    tokens: int = 0
    """Of the last answer."""
    first: float = 0.0
    """Seconds that its first token took, prompt and all."""
    others: float = 0.0
    """Seconds of the others."""

    def say(self, message: str) -> Generator[str, None, None]:
        """The answer in pieces, as it comes. Whoever stops reading it, stops it; what came so far is remembered."""
        begun = self.memory.tokens or self.memory.pending
        turn = [{"role": "user", "content": message}]
        ids = [*self.memory.pending, *(self.template.next(turn) if begun else self.template.first(turn))]
        began = time.perf_counter()
        [stream] = self.engine.submit(
            ids,
            self.sampling,
            max_tokens=self.max_tokens,
            stop_ids=sorted(self.template.stop_ids),
            state=self.memory.state,
            returns=Returns(state=True),
        )
        text, said, whole = Text(self.tokenizer, self.template.stop), "", False
        self.tokens = 0
        try:
            for token in stream:
                self.tokens += 1
                if self.tokens == 1:
                    self.first = time.perf_counter() - began
                self.others = time.perf_counter() - began - self.first
                piece = text.push(token.id)
                said += piece
                if piece:
                    yield piece
                if text.stopped:
                    break
            else:
                whole = True
                if piece := text.flush():
                    yield piece
        finally:
            self._remember(stream, ids, said, whole)

    def _remember(self, stream: Stream, ids: list[int], said: str, whole: bool) -> None:
        """The state after a whole answer; after one that was broken off the state is as before, and reads it later."""
        if stream.reason is None:
            stream.cancel()
            deque(stream, maxlen=0)  # until the engine has let it go
        old = self.memory
        if whole and stream.state is not None:
            held: Any = stream.state
            state = held.cat([held])  # without the room for decoding
            tokens = old.tokens + int(state.position[0] - old.state.position[0])
            pending = [] if stream.reason == "stop" else stream.pending  # the template writes the end of an answer
            self.memory = Memory(state, pending, tokens, old.model, old.sources, old.config)
        elif stream.reason != "error":
            pending = [*ids, *self.tokenizer.encode(said)]
            self.memory = Memory(old.state, pending, old.tokens, old.model, old.sources, old.config)

    def describe(self) -> str:
        """How much was read, what remembering it takes, and how fast the last answer came."""
        read = self.memory.tokens + len(self.memory.pending)
        line = f"{read:,} tokens read, remembered in {megabytes(self.memory.nbytes)}"
        if self.tokens:
            line += f"; first token after {self.first:.2f} s"
        if self.tokens > 1:
            line += f", then {(self.tokens - 1) / max(self.others, 1e-9):,.0f} tokens/s"
        return line


def main(argv: list[str]) -> None:
    run(tyro.cli(ChatCommand, prog="retentive chat", args=argv))


def run(command: ChatCommand) -> None:
    """Talk until the input ends."""
    if command.max_tokens < 1:
        raise ValueError(f"--max-tokens must be at least 1, got {command.max_tokens}")
    model, tokenizer = command.load()
    template = load_template(find(command.run), tokenizer, command.template)
    memory = load_memory(command.memory, model) if command.memory else blank(model)
    engine = Engine(model, slots=1).start()
    try:
        talk(Conversation(engine, tokenizer, template, command.sampling, command.max_tokens, memory), command.states)
    finally:
        engine.close(drain=False)


def talk(conversation: Conversation, states: Path) -> None:
    """Read a line, answer it. At a terminal errors and Ctrl-C end the line they concern; elsewhere, everything."""
    at_terminal = sys.stdin.isatty()
    console = Console(highlight=False, markup=False)
    if at_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  (line editing and history for input())
        console.print("/help tells the commands", style="dim")
    while True:
        try:
            line = input("> " if at_terminal else "")
            if line.startswith("/"):
                print(obey(conversation, line, states), flush=True)
            elif line.strip():
                answer(conversation, line.strip())
                if at_terminal:
                    console.print(conversation.describe(), style="dim", soft_wrap=True)
        except EOFError:
            if at_terminal:
                print()
            return
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            print()
        except (ValueError, OSError) as error:
            if not at_terminal:
                raise
            print("retentive:", " ".join(str(error).split()), file=sys.stderr)


def answer(conversation: Conversation, message: str) -> None:
    """Print it as it comes."""
    visible = sys.stdout.isatty()
    with closing(conversation.say(message)) as pieces:
        for piece in pieces:
            if visible:  # a model may write anything: no orders to the terminal
                piece = "".join(c for c in piece if c.isprintable() or c in "\n\t")
            print(piece, end="", flush=True)
    print(flush=True)


def obey(conversation: Conversation, line: str, states: Path) -> str:
    """What a command has to say."""
    verb, _, name = line.partition(" ")
    name = name.strip()
    if verb in ("/save", "/load") and not re.fullmatch(NAME, name):
        raise ValueError(f"{verb} needs a name of up to 64 letters, digits, '.', '_' and '-', got {name!r}")
    path, memory = states / f"{name}.safetensors", conversation.memory
    if verb == "/save":
        states.mkdir(parents=True, exist_ok=True)
        save(memory, path)
        return f"saved {memory.tokens + len(memory.pending):,} tokens' memory: {path}"
    if verb == "/load":
        conversation.memory = load_memory(path, conversation.engine.model, memory.model)
        return f"going on after {conversation.memory.tokens + len(conversation.memory.pending):,} tokens"
    if verb == "/forget":
        conversation.memory = blank(conversation.engine.model, memory.model)
        return "forgotten"
    if verb == "/stats":
        return conversation.describe()
    if verb == "/help":
        return HELP
    raise ValueError(f"unknown command {verb}: /help tells them")
