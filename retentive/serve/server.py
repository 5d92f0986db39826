"""Running the server: uvicorn until a signal, then a graceful drain: no new requests, those in flight are finished."""

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
"""Bytes of a request's head (first line and headers), or of a chunked body's trailers, at most."""


def serve(service: Service, host: str, port: int) -> None:
    """Answer on host:port until SIGTERM or SIGINT, then drain and return; a second signal ends the process at once.

    Port 0 takes a free one; the line on stderr says which.

    Raises:
        OSError: the address is taken, or is none of this machine's.
    """
    # our own socket: uvicorn's would log an error and exit where the address is taken
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    shown = f"[{host}]" if ":" in host else host
    print(
        f"retentive: serving {service.name} on http://{shown}:{listener.getsockname()[1]}", file=sys.stderr, flush=True
    )
    _Server(config(service), service).run(sockets=[listener])


def config(service: Service) -> uvicorn.Config:
    """uvicorn's configuration: no WebSockets, no log of each request.

    The parser is h11: httptools keeps a header until its end has come, however long it is. h11 bounds the head of a
    request, and it reads the body of one that offers another protocol (h2c), as Java's HTTP clients do.
    """
    return uvicorn.Config(
        create_app(service), http="h11", h11_max_incomplete_event_size=MOST_HEAD, ws="none",
        log_level="error",  # warnings are about requests that are malformed: a line for each would fill the log
        access_log=False, server_header=False, timeout_keep_alive=30,
    )  # fmt: skip


class _Server(uvicorn.Server):
    """uvicorn, but a signal only begins to drain; it stops when the last completion has ended."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The signal handler: the first signal begins to drain, a second ends the process."""
        if self.service.draining:
            sys.stderr.flush()
            # no clean-up, which could hang: files appear whole or not at all, so none is left half-written
            os._exit(128 + sig)
        self.service.draining = True
        requests = counted(self.service.in_flight, "request")
        print(f"retentive: {signal.Signals(sig).name}: finishing {requests}", file=sys.stderr)

    async def on_tick(self, counter: int) -> bool:
        """Whether the server is to stop; uvicorn calls it ten times a second."""
        done = self.service.draining and not self.service.in_flight
        return await super().on_tick(counter) or done
