"""`retentive chat`: a conversation in the terminal, which can be saved and continued another day.

The conversation is infer/conversation.py. The engine runs in a thread, so that Ctrl-C stops an answer at any token.
"""

import re
import sys
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.filesize import decimal

from retentive.cli.errors import described
from retentive.cli.loading import Loading
from retentive.cli.parsing import parse
from retentive.data.media import SUFFIXES, Media
from retentive.infer import SamplingParams
from retentive.infer.conversation import NAME, Conversation
from retentive.infer.engine import Engine
from retentive.infer.memory import blank, load_memory, save
from retentive.infer.text import from_the_first_word
from retentive.models import LanguageModel
from retentive.sampling import TEXT

HELP = """\
/show FILE   a picture or a sound, which the next message is about
/save NAME   keep all that was said and read in a file
/load NAME   go on from such a file
/forget      begin anew
/stats       how much was read, and what remembering it takes
/quit        leave, as /exit and Ctrl-D do
Ctrl-C stops an answer. A message that begins with / takes a space before it."""


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
    sampling: Annotated[SamplingParams, tyro.conf.arg(name="")] = TEXT


def main(argv: list[str]) -> None:
    run(parse(ChatCommand, "retentive chat", argv))


def run(command: ChatCommand) -> None:
    """Talk until the input ends."""
    if command.max_tokens < 1:
        raise ValueError(f"--max-tokens must be at least 1, got {command.max_tokens}")
    model, tokenizer = command.load()
    template = command.template_for(tokenizer, command.template)
    memory = load_memory(command.memory, model) if command.memory else blank(model)
    engine = Engine(model, slots=1).start()
    talk = Talk(Conversation(engine, tokenizer, template, memory), command)
    try:
        talk.until_the_input_ends()
    finally:
        engine.close(drain=False)  # Ctrl-C in an answer: the rest of it is not wanted
    if talk.failed and not talk.at_terminal:
        sys.exit(2)  # a script must notice; at a terminal the message was seen


class Talk:
    """The terminal's side of a conversation: lines in, answers out, and how long they took."""

    def __init__(self, conversation: Conversation, command: ChatCommand):
        self.conversation, self.command = conversation, command
        self.at_terminal = sys.stdin.isatty()
        self.first = self.others = 0.0
        """Seconds from the last question to the first text of its answer, and from there to its end."""
        self.failed = False
        """Whether a /save has failed, or a command was unknown."""
        self.shown: list[Media] = []
        """The pictures and sounds that the next message begins with."""

    def until_the_input_ends(self) -> None:
        """Read lines and answer them. An error or Ctrl-C ends one line at a terminal; in a script it ends all."""
        console = Console(highlight=False, markup=False)
        if self.at_terminal:
            with suppress(ImportError):
                import readline  # noqa: F401  (line editing and history for input())
            console.print("/help tells the commands", style="dim")
        while True:
            try:
                line = input("> " if self.at_terminal else "")
                line.encode()  # in some locales Python lets through what is no text, as lone surrogates
                if line.strip() in ("/quit", "/exit"):
                    return
                if line.startswith("/"):
                    print(self.obey(line), flush=True)
                elif line.strip():
                    self.answer(line.strip())
                    if self.at_terminal:
                        console.print(self.describe(), style="dim", soft_wrap=True)
            except EOFError:
                if self.at_terminal:
                    print()  # the shell's prompt begins on a line of its own
                return
            except KeyboardInterrupt:
                if not self.at_terminal:
                    raise
                print()
            except (ValueError, OSError, ImportError) as error:
                if isinstance(error, UnicodeDecodeError | UnicodeEncodeError):
                    error = ValueError(f"the message is not UTF-8 text ({error.reason} at {error.start})")
                if not self.at_terminal:
                    raise error from None
                print("retentive:", described(error, "chat"), file=sys.stderr)

    def answer(self, message: str) -> None:
        """Print it as it comes."""
        visible, began, self.first = sys.stdout.isatty(), time.perf_counter(), 0.0
        content = [*self.shown, message] if self.shown else message
        self.shown = []
        said = self.conversation.say(content, self.command.sampling, max_tokens=self.command.max_tokens)
        with closing(said) as pieces:  # on Ctrl-C the conversation remembers at once what came so far
            for piece in from_the_first_word(pieces):
                self.first = self.first or time.perf_counter() - began
                if visible:  # a model may write anything: no escape sequences to the terminal
                    piece = "".join(c for c in piece if c.isprintable() or c in "\n\t")
                print(piece, end="", flush=True)
        self.others = time.perf_counter() - began - self.first
        print(flush=True)

    def describe(self) -> str:
        """A line: tokens read, bytes that remembering them takes, and the speed of the last answer."""
        conversation, made = self.conversation, self.conversation.made
        line = f"{self.read:,} tokens read, remembered in {decimal(conversation.memory.nbytes)}"
        if self.first:
            line += f"; first token after {self.first:.2f} s"
        if self.first and made > 1:
            line += f", then {(made - 1) / max(self.others, 1e-9):,.0f} tokens/s"
        return line

    @property
    def read(self) -> int:
        """Tokens of the conversation so far, those that are yet to be read by the model included."""
        return self.conversation.memory.tokens + len(self.conversation.memory.pending)

    def obey(self, line: str) -> str:
        """Carries out a command such as `/save tea`; what is to be printed.

        Raises:
            ValueError, OSError, ImportError: a bad name, a file that cannot be loaded or shown.
        """
        conversation, memory = self.conversation, self.conversation.memory
        verb, _, name = line.partition(" ")
        name = name.strip()
        if verb in ("/save", "/load") and not re.fullmatch(NAME, name):
            raise ValueError(f"{verb} needs a name of up to 64 letters, digits, '.', '_' and '-', got {name!r}")
        path = self.command.states / f"{name}.safetensors"
        if verb == "/save":
            try:
                save(memory, path)
            except OSError as error:
                self.failed = True
                # such as a full disk: not raised, since in a script that would end the conversation unsaved
                return f"not saved, the conversation goes on: {error}"
            return f"saved {self.read:,} tokens' memory: {path}"
        if verb == "/load":
            self.shown = []
            conversation.memory = load_memory(path, conversation.engine.model, memory.model)
            return f"going on after {self.read:,} tokens"
        if verb == "/show":
            self.shown.append(opened(conversation.engine.model, name))
            return f"{name}: {len(self.shown[-1].rows):,} tokens, read with the next message"
        if verb == "/forget":
            self.shown = []
            conversation.memory = blank(conversation.engine.model, memory.model)
            return "forgotten"
        if verb == "/stats":
            return self.describe()
        if verb == "/help":
            return HELP
        self.failed = True  # not raised, for the same reason as above
        return f"unknown command {verb}: /help tells them"


def opened(model: LanguageModel, name: str) -> Media:
    """The picture or sound in a file, as the model sees and hears it.

    Raises:
        ValueError, OSError: no file, none of these, or the model has no encoder for it.
        ImportError: without the extra `multimodal`.
    """
    kind = SUFFIXES.get(Path(name).suffix.lower())
    if kind is None:
        raise ValueError(f"/show needs a picture or a sound ({' '.join(SUFFIXES)}), got {name!r}")
    from retentive.multimodal.prepare import Opener  # an extra

    return Opener.of(model)(kind, name, folder=Path())
