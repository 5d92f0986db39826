"""`retentive generate FILE.onnx`: a graph writes on from a prompt, by numpy, tokenizers and onnxruntime alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from retentive.cli.typing_out import prompt_text, type_out
from retentive.data.tokenizer import Tokenizer, load_tokenizer
from retentive.export.onnx_run import OnnxModel, generate
from retentive.sampling import TEXT, SamplingParams


@dataclass(frozen=True, kw_only=True)
class GenerateOnnxCommand:
    """Let a model that was exported to ONNX write; the tokenizer beside it is read."""

    graph: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE.onnx")]
    """What `retentive export RUN --to onnx` has written."""
    prompt: str = ""
    """What to go on from; - reads standard input; the start of a document if empty."""
    max_tokens: int = 200
    """Tokens to write at most."""
    threads: int = 0
    """That a call uses; as many as onnxruntime thinks, if 0."""
    sampling: Annotated[SamplingParams, tyro.conf.arg(name="")] = TEXT


def main(argv: list[str]) -> None:
    run(tyro.cli(GenerateOnnxCommand, prog="retentive generate", args=argv))


def run(command: GenerateOnnxCommand) -> None:
    """Print the prompt and what the model writes after it, as it comes."""
    if command.max_tokens < 1:
        raise ValueError(f"--max-tokens must be at least 1, got {command.max_tokens}")
    model = OnnxModel(command.graph, threads=command.threads)
    tokenizer = load_tokenizer(command.graph.parent)
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(f"{command.graph.parent} has a tokenizer of {tokenizer.vocab_size:,} tokens, not the graph's")
    prompt = prompt_text(command.prompt)
    type_out(prompt, pieces(model, tokenizer, prompt, command))


def pieces(model: OnnxModel, tokenizer: Tokenizer, prompt: str, command: GenerateOnnxCommand) -> Iterator[str]:
    """The text in whole characters."""
    ids, stream = [tokenizer.eos_id, *tokenizer.encode(prompt)], tokenizer.stream()
    for id in generate(model, ids, command.sampling, max_tokens=command.max_tokens):
        yield stream.push(id)
    yield stream.flush()
