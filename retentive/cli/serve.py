"""`retentive serve`: serve a model by OpenAI's HTTP API, with a chat page."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from retentive.cli.loading import LoadingPlain
from retentive.cli.parsing import parse
from retentive.serve.options import Options


@dataclass(frozen=True, kw_only=True)
class ServeCommand(LoadingPlain):
    """Serve a model to OpenAI clients and browsers. Each request takes the memory of one state, whatever its length."""

    adapter: Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN|NAME=RUN")] = ()
    """LoRA adapter (a run with --lora) to merge into RUN. Or several as NAME=RUN: each is served beside the model, and
    requests choose it by its name (`model`). Each takes the memory of a model."""
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
    adapters = _adapters(command.adapter)
    service = open_service(command.folder, options, tokenizer=command.tokenizer, load=command.model, adapter=adapters)
    serve(service, command.host, command.port)


def _adapters(given: tuple[str, ...]) -> str | dict[str, str] | None:
    """Returns the one adapter to merge, or all by their names; None if none is given."""
    named = [adapter.partition("=")[::2] for adapter in given]
    if not any(path for _, path in named):
        if len(given) > 1:
            raise ValueError(f"--adapter {' '.join(given)}: give several as NAME=RUN, or one to merge")
        return given[0] if given else None
    if unnamed := [name for name, path in named if not path]:
        raise ValueError(f"--adapter {unnamed[0]}: expected NAME=RUN, as the others")
    if twice := [name for n, (name, _) in enumerate(named) if name in dict(named[:n])]:
        raise ValueError(f"--adapter {twice[0]}={dict(named)[twice[0]]}: two adapters have that name; choose another")
    return dict(named)
