"""`retentive generate`: a model writes on from a prompt, printed as it comes."""

from dataclasses import asdict, dataclass
from typing import Annotated

import tyro

import retentive
from retentive.cli.loading import Loading, prompt_text, type_out
from retentive.infer import SamplingParams
from retentive.infer.writing import TEXT, stream_generate


@dataclass(frozen=True, kw_only=True)
class GenerateCommand(Loading):
    """Let a model write: the prompt is read in chunks, then a state of constant size goes on token by token."""

    prompt: str = ""
    """What to go on from; - reads standard input; the start of a document if empty."""
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
    run(tyro.cli(GenerateCommand, prog="retentive generate", args=argv))


def run(command: GenerateCommand) -> None:
    """Print the prompt and what the model writes after it, as it comes."""
    model, tokenizer = command.load()
    draft = None if command.draft is None else command.ready(retentive.load(command.draft, device=command.device)[0])
    prompt = prompt_text(command.prompt)
    how = {"beams": command.beams, "lookup": command.lookup, "draft": draft, **asdict(command.sampling)}
    type_out(
        prompt,
        stream_generate(model, tokenizer, prompt, max_tokens=command.max_tokens, stop=command.stop, **how),
    )
