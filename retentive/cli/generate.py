"""`retentive generate`: a model writes on from a prompt, character by character as it thinks."""

import sys
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import tyro

import retentive
from retentive.data.tokenizer import load_tokenizer
from retentive.infer import SamplingParams, write_on


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
    for text in write_on(model, tokenizer, prompt, command.sampling, max_tokens=command.max_tokens, stop=command.stop):
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")
