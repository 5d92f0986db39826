"""`retentive generate FILE.onnx`: an exported model continues a prompt, without importing torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from retentive.cli.parsing import parse
from retentive.cli.typing_out import prompt_text, type_out
from retentive.data.tokenizer import Tokenizer, check_tokens, load_tokenizer
from retentive.export.onnx_run import OnnxModel
from retentive.export.writing import generate
from retentive.sampling import TEXT, SamplingParams


@dataclass(frozen=True, kw_only=True)
class GenerateExportedCommand:
    """Generate text by an exported model, with the tokenizer beside it."""

    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """model.onnx of a folder that `retentive export RUN --to onnx` wrote."""
    prompt: str = ""
    """Text to continue; - reads standard input; empty starts a document."""
    max_tokens: int = 200
    """Maximum tokens to generate."""
    sampling: Annotated[SamplingParams, tyro.conf.arg(name="")] = TEXT


def main(argv: list[str]) -> None:
    run(parse(GenerateExportedCommand, "retentive generate", argv))


def run(command: GenerateExportedCommand) -> None:
    """Print the prompt and the generated text, as it comes."""
    if command.max_tokens < 1:
        raise ValueError(f"--max-tokens must be at least 1, got {command.max_tokens}")
    model = OnnxModel(command.file)
    tokenizer = load_tokenizer(command.file.parent)
    check_tokens(tokenizer, model.vocab_size)
    prompt = prompt_text(command.prompt)
    type_out(prompt, pieces(model, tokenizer, prompt, command))


def pieces(model: OnnxModel, tokenizer: Tokenizer, prompt: str, command: GenerateExportedCommand) -> Iterator[str]:
    """Yield the generated text in whole characters."""
    ids, stream = [tokenizer.eos_id, *tokenizer.encode(prompt)], tokenizer.stream()
    for id in generate(model, ids, command.sampling, max_tokens=command.max_tokens):
        yield stream.push(id)
    yield stream.flush()
