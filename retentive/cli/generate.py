"""`retentive generate`: a model writes on from a prompt, character by character as it thinks."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

import tyro

import retentive
from retentive.cli.loading import Loading
from retentive.infer import SamplingParams, Token, generate, write_on
from retentive.infer.beam import likeliest
from retentive.infer.speculative import speculate


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
    sampling: Annotated[SamplingParams, tyro.conf.arg(name="")] = field(
        default_factory=lambda: SamplingParams(temperature=0.8, top_p=0.95)
    )


def main(argv: list[str]) -> None:
    run(tyro.cli(GenerateCommand, prog="retentive generate", args=argv))


def run(command: GenerateCommand) -> None:
    """Print the prompt and what the model makes of it, as it comes."""
    if command.max_tokens < 1:
        raise ValueError(f"--max-tokens must be at least 1, got {command.max_tokens}")
    model, tokenizer = command.load()
    prompt = sys.stdin.read() if command.prompt == "-" else command.prompt
    how, limit = method(command), command.max_tokens
    for text in write_on(model, tokenizer, prompt, command.sampling, max_tokens=limit, stop=command.stop, how=how):
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")


def method(command: GenerateCommand) -> Callable[..., Iterator[Token]]:
    """How tokens are found: one by one, by guesses, or by beam search."""
    if command.beams < 0:
        raise ValueError(f"--beams must be at least 1, or 0 to sample, got {command.beams}")
    if bool(command.beams) + command.lookup + (command.draft is not None) > 1:
        raise ValueError("--beams, --lookup and --draft exclude each other: choose one")
    if command.beams:
        if command.sampling != GenerateCommand(run=command.run).sampling:
            raise ValueError("--beams looks for the likeliest text: it has no sampling options")
        return partial(likeliest, beams=command.beams)
    if command.draft is not None:
        draft, _ = retentive.load(command.draft, device=command.device)
        return partial(speculate, draft=draft)
    return speculate if command.lookup else generate
