"""`retentive serve`: serve a model by OpenAI's HTTP API, with a chat page."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from retentive.cli.loading import Loading
from retentive.cli.parsing import parse
from retentive.serve.options import Options


@dataclass(frozen=True, kw_only=True)
class ServeCommand(Loading):
    """Serve a model to OpenAI clients and browsers. Each request takes the memory of one state, whatever its length."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all addresses of this machine."""
    port: int = 8000
    """Port to listen on; 0 picks a free one."""
    options: Annotated[Options, tyro.conf.arg(name="")] = field(default_factory=Options)


def main(argv: list[str]) -> None:
    run(parse(ServeCommand, "retentive serve", argv))


def run(command: ServeCommand) -> None:
    """Serve until a signal comes."""
    try:  # an extra; --help works without it
        from retentive.serve.server import serve
        from retentive.serve.service import open_service
    except ModuleNotFoundError as error:
        raise ImportError(f"the server needs {error.name}: pip install 'retentive[serve]'") from None
    if not 0 <= command.port < 65536:
        raise ValueError(f"--port must be from 0 to 65535, got {command.port}")
    options = command.options.with_environment_keys()
    service = open_service(
        command.folder, options, tokenizer=command.tokenizer, load=command.model, adapter=command.change
    )
    serve(service, command.host, command.port)
