"""HTTP connections with bounds in bytes and seconds, which uvicorn's own protocol lacks: anyone can connect, even
without an API key.

- A request's head (first line and headers) and the trailers after a chunked body are bounded in bytes: 431. The parser
  keeps a header until its end has come, however long, and copies it at every packet.
- Heads and bodies that come slowly (slowloris), and idle connections, are closed after some seconds.
- When the client leaves, all of its pipelined requests hear of it, not the last alone.
- Offers to upgrade (WebSocket, h2c) are ignored and malformed requests refused, without a line in the log for each.
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
"""Bytes of a head at most."""
HEAD_SECONDS = 20
"""Time for a head to come, if the server's time-out is not shorter."""
GRACE = 5
"""Seconds after BODY_SECONDS until a late body closes the connection: first the endpoint may answer 408 itself."""
LINGER = 2
"""Seconds in which a refused client may read the answer, while what it still sends is thrown away."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection. The parser (httptools) calls the `on_` methods as it comes to the parts of a request."""

    head_seconds, body_seconds = float(HEAD_SECONDS), float(BODY_SECONDS + GRACE)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _Flow(transport)
        self.cycles: list[Any] = []  # uvicorn's RequestResponseCycle of requests that are not answered yet
        self.head = 0  # bytes of the head (or trailers) so far: since the last byte of a body, or the end of a request
        self.awaited: str | None = None  # the part that has begun and not ended: "head" or "body"
        self.refused = self.muted = False
        self.timer: asyncio.TimerHandle | None = None
        self._expect(self.head_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(None)
        self._disconnect()
        super().connection_lost(exc)

    def _disconnect(self) -> None:
        """Tells every request that is still being answered that its client has left; uvicorn tells only the last."""
        self.pipeline.clear()
        for cycle in self._unanswered():
            cycle.disconnected = True
            cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        """Feeds the parser; what uvicorn does here, with bounds and without its log lines."""
        self._unset_keepalive_if_required()
        if self.timer is None and not self.refused:
            self._expect(self.head_seconds)
        while data and not self.refused:
            # no more at a time than the head may still have, so that the parser never holds more
            part, data = data[: MOST_HEAD + 1 - self.head], data[MOST_HEAD + 1 - self.head :]
            self.head += len(part)
            try:
                self.parser.feed_data(part)
            except httptools.HttpParserUpgrade as offer:  # ignored, as a server may (RFC 9110, 7.8)
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
        if self.timer is None:  # pipelined: it came in one packet with the end of the request before
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
        self.head = 0  # bytes of a body are the endpoint's to count
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade() and self._framing():
            return  # its body is still to come
        self.head, self.awaited = 0, None
        self._expect(None)
        super().on_message_complete()

    def _expect(self, seconds: float | None) -> None:
        """Starts the time in which the rest of a head or body must come; None stops it."""
        if self.timer is not None:
            self.timer.cancel()
        self.timer = None if seconds is None else self.loop.call_later(seconds, self._late)

    def _late(self) -> None:
        """The time is over: refuses a late head, closes an idle connection or one with a late body."""
        # no fault of the client: we do not read, or it waits for the answer to its last request
        if self.flow.read_paused or (self.awaited != "body" and self._unanswered()):
            self._expect(self.head_seconds)
        elif self.awaited == "head":
            self._refuse(Refused(408, f"the head of a request did not come within {self.head_seconds:g} s"))
        else:
            self.transport.close()

    def _unanswered(self) -> list[Any]:
        """The cycles of requests whose answers are not complete."""
        return [cycle for cycle in self.cycles if not cycle.response_complete]

    def _refuse(self, error: Refused) -> None:
        """Writes the last answer on this connection, and closes it after LINGER.

        Closed at once with bytes unread, the kernel would send RST, and the client could lose the answer.
        """
        if self.refused or self.transport.is_closing():
            return
        self.refused = True
        # else these bytes would land in the middle of another answer
        if not any(cycle.response_started for cycle in self._unanswered()):
            self._disconnect()
            body = to_json(error.body)
            status = f"{error.status} {HTTPStatus(error.status).phrase}"
            head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
            self.transport.write_eof()
        if self.timer is not None:
            self.timer.cancel()
        self.timer = self.loop.call_later(LINGER, self.transport.close)


class _Flow(FlowControl):
    """Flow control that leaves a closing connection alone: uvloop raises when one is paused or resumed."""

    def pause_reading(self) -> None:
        if not self._transport.is_closing():
            super().pause_reading()

    def resume_reading(self) -> None:
        if not self._transport.is_closing():
            super().resume_reading()


def bounded(options: Options) -> type[BoundedProtocol]:
    """The protocol class of a server with these options: it waits no longer than the server's time-out."""

    class Protocol(BoundedProtocol):
        head_seconds = min(HEAD_SECONDS, options.timeout)
        body_seconds = min(BODY_SECONDS, options.timeout) + GRACE

    return Protocol
