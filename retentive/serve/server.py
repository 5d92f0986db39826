"""Runs the server by uvicorn. A signal begins a graceful drain: no new requests, and those in flight finish."""

import os
import signal
import socket
import sys
from types import FrameType

import uvicorn

from retentive.serve.app import create_app
from retentive.serve.service import Service
from retentive.tables import counted

MOST_HEAD = 65536
"""Maximum bytes of a request's head (first line and headers), or of a chunked body's trailers."""


def serve(service: Service, host: str, port: int) -> None:
    """Serves on host:port until SIGTERM or SIGINT, then drains and returns. A second signal ends the process at once.

    Port 0 picks a free one, named in the line on stderr.

    Raises:
        OSError: the address is taken, or is not of this machine.
    """
    # our own socket: uvicorn's would log an error and exit if the address is taken
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    shown = f"[{host}]" if ":" in host else host
    names, port = ", ".join(each.name for each in service.all), listener.getsockname()[1]
    print(f"retentive: serving {names} on http://{shown}:{port}", file=sys.stderr, flush=True)
    _Server(config(service), service).run(sockets=[listener])


def config(service: Service) -> uvicorn.Config:
    """Returns uvicorn's configuration: no WebSockets, no log of requests.

    The parser is h11: httptools keeps a header until its end has come, however long it is. h11 bounds the head of a
    request, and it reads the body of one that offers another protocol (h2c), as Java's HTTP clients do.
    """
    return uvicorn.Config(
        create_app(service), http="h11", h11_max_incomplete_event_size=MOST_HEAD, ws="none",
        log_level="error",  # warnings are about malformed requests, and a line for each would fill the log
        access_log=False, server_header=False, timeout_keep_alive=30,
    )  # fmt: skip


class _Server(uvicorn.Server):
    """uvicorn whose signals only begin a drain; it stops when the last completion has ended."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handles signals: the first begins the drain, the second ends the process."""
        if self.service.draining:
            sys.stderr.flush()
            # no clean-up, which could hang; files are written whole or not at all, so none is left half-written
            os._exit(128 + sig)
        self.service.drain()
        requests = counted(self.service.unfinished, "request")
        print(f"retentive: {signal.Signals(sig).name}: finishing {requests}", file=sys.stderr)

    async def on_tick(self, counter: int) -> bool:
        """Returns True if the server shall stop; uvicorn calls it ten times a second."""
        done = self.service.draining and not self.service.unfinished
        return await super().on_tick(counter) or done
