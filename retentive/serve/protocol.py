"""HTTP connections with bounds: what uvicorn's own protocol leaves open to whoever may connect, key or no key.

- A request's head (its first line and headers) and the trailers after a chunked body are bounded in bytes: 431. The
  parser keeps a header until its end has come, however long, and copies it at every packet.
- Heads and bodies that come slowly, and connections that say nothing, are closed in time.
- Of pipelined requests all hear that the client has left, not the last alone.
- Offers to upgrade (WebSocket, h2c) are ignored, and nonsense is refused, without a line in the log for each.
"""

import asyncio
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from retentive.serve.errors import Refused
from retentive.serve.options import Options
from retentive.serve.requests import BODY_SECONDS
from retentive.serve.responses import to_json

MOST_HEAD = 65536
"""Bytes of a head."""
HEAD_SECONDS = 20
"""In which a head must have come, if the server's time-out is not shorter still."""
GRACE = 5
"""Seconds after which a body that is late is not waited for any more: by then the endpoint has said so itself."""
LINGER = 2
"""Seconds in which a client that was refused may take the answer, while what it still sends is thrown away."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection. The parser calls the `on_` methods as it comes to the parts of a request."""

    head_seconds, body_seconds = float(HEAD_SECONDS), float(BODY_SECONDS + GRACE)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _Flow(transport)
        self.cycles: list[Any] = []  # uvicorn's RequestResponseCycle of requests that are not answered yet
        self.head = 0  # bytes since the last that belonged to a body, or the end of a request
        self.awaited: str | None = None  # the "head" or "body" that has begun and not ended
        self.refused = self.muted = False
        self.clock: asyncio.TimerHandle | None = None
        self._expect(self.head_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(None)
        self._disconnect()
        super().connection_lost(exc)

    def _disconnect(self) -> None:
        """Whoever still answers hears that nobody listens."""
        self.pipeline.clear()
        for cycle in self._unanswered():
            cycle.disconnected = True
            cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self.clock is None and not self.refused:
            self._expect(self.head_seconds)
        while data and not self.refused:
            # in parts, so that a head is never held beyond its bound
            part, data = data[: MOST_HEAD + 1 - self.head], data[MOST_HEAD + 1 - self.head :]
            self.head += len(part)
            try:
                self.parser.feed_data(part)
            except httptools.HttpParserUpgrade as offer:  # ignored: HTTP/1.1 goes on (RFC 9110, 7.8)
                rest = part[offer.args[0] :]
                self.head -= len(rest)
                data = self._body_anew() + rest + data
            except httptools.HttpParserError:
                self._refuse(Refused(400, "this is not HTTP/1.1"))
            if self.head > MOST_HEAD:
                self._refuse(Refused(431, f"the head of a request is larger than {MOST_HEAD} bytes"))

    def _body_anew(self) -> bytes:
        """Has a new parser read the body of a request that offers to upgrade, and gives the head that it needs for it.

        The old one takes the body for another protocol. HTTP clients of Java make that offer with every request.
        """
        if not (framing := self._framing()):
            return b""
        self.parser, self.muted = httptools.HttpRequestParser(self), True
        return b"POST / HTTP/1.1\r\n" + b"".join(b"%s: %s\r\n" % header for header in framing) + b"\r\n"

    def _framing(self) -> list[tuple[bytes, bytes]]:
        """The headers that say how long the body is; none where there is no body."""
        return [(name, value) for name, value in self.headers if name in (b"content-length", b"transfer-encoding")]

    def on_message_begin(self) -> None:
        if self.muted:
            return
        super().on_message_begin()
        self.awaited = "head"
        if self.clock is None:  # it came in one packet with the end of the request before
            self._expect(self.head_seconds)

    def on_url(self, url: bytes) -> None:
        if not self.muted:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.muted:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.muted:
            self.muted = False
            return
        super().on_headers_complete()
        self.cycles = [*self._unanswered(), self.cycle]
        self.awaited = "body"
        self._expect(self.body_seconds)

    def on_body(self, body: bytes) -> None:
        self.head = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade() and self._framing():
            return  # its body is still to come
        self.head, self.awaited = 0, None
        self._expect(None)
        super().on_message_complete()

    def _expect(self, seconds: float | None) -> None:
        """The rest of a head or body is to come in so many seconds; None: nothing is."""
        if self.clock is not None:
            self.clock.cancel()
        self.clock = None if seconds is None else self.loop.call_later(seconds, self._late)

    def _late(self) -> None:
        if self.flow.read_paused or (self.awaited != "body" and self._unanswered()):  # busy with the request before
            self._expect(self.head_seconds)
        elif self.awaited == "head":
            self._refuse(Refused(408, f"the head of a request did not come within {self.head_seconds:g} s"))
        else:
            self.transport.close()

    def _unanswered(self) -> list[Any]:
        return [cycle for cycle in self.cycles if not cycle.response_complete]

    def _refuse(self, error: Refused) -> None:
        """The last answer on this connection. Closed at once, the system would throw it away with what is unread."""
        if self.refused or self.transport.is_closing():
            return
        self.refused = True
        if not any(cycle.response_started for cycle in self._unanswered()):  # else it would land in another's answer
            self._disconnect()
            body = to_json(error.body)
            status = f"{error.status} {HTTPStatus(error.status).phrase}"
            head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
            self.transport.write_eof()
        if self.clock is not None:
            self.clock.cancel()
        self.clock = self.loop.call_later(LINGER, self.transport.close)


class _Flow(FlowControl):
    """uvloop raises where a connection that is closed is paused or resumed."""

    def pause_reading(self) -> None:
        if not self._transport.is_closing():
            super().pause_reading()

    def resume_reading(self) -> None:
        if not self._transport.is_closing():
            super().resume_reading()


def bounded(options: Options) -> type[BoundedProtocol]:
    """The protocol of a server with these options: none of its waits is longer than its time-out."""

    class Protocol(BoundedProtocol):
        head_seconds = min(HEAD_SECONDS, options.timeout)
        body_seconds = min(BODY_SECONDS, options.timeout) + GRACE

    return Protocol
