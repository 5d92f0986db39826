"""`retentive generate`: a model writes on from a prompt, printed as it comes."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from retentive.checkpoint import ModelFolder
from retentive.cli.loading import Loading
from retentive.cli.parsing import check_once, parse, typed_options
from retentive.cli.typing_out import prompt_text, type_out
from retentive.data.media import KINDS, Media
from retentive.data.tokenizer import Tokenizer
from retentive.infer import SamplingParams
from retentive.infer.media import answer
from retentive.infer.writing import stream_generate
from retentive.models import LanguageModel
from retentive.sampling import TEXT


@dataclass(frozen=True, kw_only=True)
class GenerateCommand(Loading):
    """Let a model write: the prompt is read in chunks, then a state of constant size goes on token by token."""

    prompt: str = ""
    """What to go on from; - reads standard input; the start of a document if empty."""
    image: tuple[str, ...] = ()
    """Pictures that the prompt is about, for a model that sees: it answers, by its chat template. It is shown them in
    this order, then the sounds, then the prompt."""
    audio: tuple[str, ...] = ()
    """Sounds that it is about, for one that hears."""
    max_tokens: int = 200
    """Tokens to write at most."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not printed."""
    beams: int = 0
    """Continuations to follow at once, of which the likeliest is printed at the end; 0 samples."""
    lookup: bool = False
    """Guess tokens from what was written before, several to a call: the same text sooner, where it repeats itself."""
    draft: str | None = None
    """Run of a smaller model of the same vocabulary that guesses tokens."""
    sampling: Annotated[SamplingParams, tyro.conf.arg(name="")] = TEXT


def main(argv: list[str]) -> None:
    command = parse(GenerateCommand, "retentive generate", argv)
    check_once(argv, "image", "audio", "stop")
    for kind in KINDS:
        if kind in typed_options(argv) and not getattr(command, kind):
            raise ValueError(f"--{kind} names no file")
    run(command)


def about(command: GenerateCommand, model: LanguageModel, tokenizer: Tokenizer, prompt: str) -> Iterator[str]:
    """The answer to the prompt about pictures and sounds, in pieces."""
    if command.beams or command.lookup or command.draft:
        raise ValueError("--beams, --lookup and --draft are for text alone: leave them out with --image and --audio")
    files = [("image", name) for name in command.image] + [("audio", name) for name in command.audio]
    from retentive.multimodal.prepare import Opener  # an extra

    opener = Opener.of(model)
    template = command.template_for(tokenizer)
    content: list[str | Media] = [*(opener(kind, name, folder=Path()) for kind, name in files), prompt]
    return answer(model, template, content, command.sampling, max_tokens=command.max_tokens, stop=command.stop)


def run(command: GenerateCommand) -> None:
    """Print the prompt and what the model writes after it, as it comes."""
    model, tokenizer = command.load()
    draft = None if command.draft is None else command.model(ModelFolder.open(command.draft))
    prompt = prompt_text(command.prompt)
    if command.image or command.audio:
        type_out("", about(command, model, tokenizer, prompt))
        return
    how = {"beams": command.beams, "lookup": command.lookup, "draft": draft, **asdict(command.sampling)}
    type_out(
        prompt,
        stream_generate(model, tokenizer, prompt, max_tokens=command.max_tokens, stop=command.stop, **how),
    )
