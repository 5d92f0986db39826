"""`retentive generate`: generate text from a prompt, printed as it comes."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from retentive.checkpoint import ModelFolder
from retentive.cli.loading import Loading
from retentive.cli.parsing import check_once, parse, typed_options
from retentive.cli.typing_out import piped, prompt_text, type_out
from retentive.data.media import KINDS, Media
from retentive.data.tokenizer import Tokenizer
from retentive.infer import SamplingParams
from retentive.infer.media import answer
from retentive.infer.writing import stream_generate
from retentive.models import LanguageModel
from retentive.sampling import TEXT


@dataclass(frozen=True, kw_only=True)
class GenerateCommand(Loading):
    """Generate text: read the prompt in chunks, then decode token by token from a state of constant size."""

    text: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PROMPT")] = ""
    """The same as --prompt."""
    prompt: str = ""
    """Text to continue; - reads standard input, as does a pipe. Empty starts a document."""
    image: tuple[str, ...] = ()
    """Pictures for a model that sees. The model gets them in this order, then the sounds, then the prompt, and answers
    by its chat template."""
    audio: tuple[str, ...] = ()
    """Sounds for a model that hears."""
    max_tokens: int = 200
    """Maximum tokens to generate."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not printed."""
    beams: int = 0
    """Beam search with this many beams; prints the likeliest text at the end. 0 samples."""
    lookup: bool = False
    """Speculative decoding by prompt look-up: the same text, faster for repetitive text."""
    draft: str | None = None
    """Run of a smaller model with the same vocabulary, for speculative decoding."""
    sampling: Annotated[SamplingParams, tyro.conf.arg(name="")] = TEXT


def main(argv: list[str]) -> None:
    command = parse(GenerateCommand, "retentive generate", argv)
    check_once(argv, "image", "audio", "stop")
    for kind in KINDS:
        if kind in typed_options(argv) and not getattr(command, kind):
            raise ValueError(f"--{kind} names no file")
    run(command)


def about(command: GenerateCommand, model: LanguageModel, tokenizer: Tokenizer, prompt: str) -> Iterator[str]:
    """Yield pieces of the answer to the prompt about pictures and sounds."""
    if command.beams or command.lookup or command.draft:
        raise ValueError("--beams, --lookup and --draft are for text alone: leave them out with --image and --audio")
    files = [("image", name) for name in command.image] + [("audio", name) for name in command.audio]
    from retentive.multimodal.prepare import Opener  # an extra

    opener = Opener.of(model)
    template = command.template_for(tokenizer)
    content: list[str | Media] = [*(opener(kind, name, folder=Path()) for kind, name in files), prompt]
    return answer(model, template, content, command.sampling, max_tokens=command.max_tokens, stop=command.stop)


def run(command: GenerateCommand) -> None:
    """Print the prompt and the generated text, as it comes."""
    if command.text and command.prompt:
        raise ValueError(f"--prompt {command.prompt}: the prompt {command.text!r} is given already: leave out one")
    model, tokenizer = command.load()
    draft = None if command.draft is None else command.model(ModelFolder.open(command.draft))
    prompt = prompt_text(command.text or command.prompt or piped())
    if command.image or command.audio:
        type_out("", about(command, model, tokenizer, prompt))
        return
    how: dict[str, Any] = {"beams": command.beams, "lookup": command.lookup, "draft": draft, "engine": command.engine}
    how |= asdict(command.sampling)
    type_out(
        prompt,
        stream_generate(model, tokenizer, prompt, max_tokens=command.max_tokens, stop=command.stop, **how),
    )
