"""`retentive generate`: a model writes on from a prompt, character by character as it thinks."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Literal

import torch
import tyro

import retentive
from retentive.data.tokenizer import load_tokenizer
from retentive.infer import SamplingParams, Token, generate, write_on
from retentive.infer.beam import likeliest
from retentive.infer.speculative import speculate


@dataclass(frozen=True)
class GenerateCommand:
    """Let a model write: the prompt is read in chunks, then a state of constant size goes on token by token."""

    run: tyro.conf.Positional[str]
    """Run directory or model folder (ours, torchscale's or fla's), or owner/name on the hub."""
    prompt: str = ""
    """What to go on from; - reads standard input; the start of a document if empty."""
    max_tokens: int = 200
    """Tokens to write at most."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not printed."""
    tokenizer: str | None = None
    """A tokenizer (bytes, or a tokenizer.json) for models that come without one."""
    device: str = "cpu"
    """cpu, cuda, mps, or auto."""
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"
    """Of the weights; the state is float32 in any case."""
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
    dtype = None if command.dtype == "stored" else getattr(torch, command.dtype)
    model, tokenizer = retentive.load(command.run, device=command.device, dtype=dtype)
    if command.tokenizer:
        tokenizer = load_tokenizer(command.tokenizer)
    if tokenizer is None:
        raise ValueError(f"{command.run} has no tokenizer.json: name one with --tokenizer (bytes, or a file)")
    if tokenizer.vocab_size > model.config.vocab_size:
        have, need = tokenizer.vocab_size, model.config.vocab_size
        raise ValueError(f"the tokenizer has {have} tokens, the model {need}: they do not belong together")
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
        if command.sampling != GenerateCommand(command.run).sampling:
            raise ValueError("--beams looks for the likeliest text: it has no sampling options")
        return partial(likeliest, beams=command.beams)
    if command.draft is not None:
        draft, _ = retentive.load(command.draft, device=command.device)
        return partial(speculate, draft=draft)
    return speculate if command.lookup else generate
