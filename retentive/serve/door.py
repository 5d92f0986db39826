"""What stands before every endpoint: keys, the name the server is called by, the size and kind of bodies, the count."""

import asyncio
import ipaddress

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retentive.serve.errors import Refused
from retentive.serve.options import Options
from retentive.serve.service import Service

BODY_SECONDS = 60
"""In which a body must have come."""
ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/states", "/v1/sessions", "/v1/info")


class Door:
    """ASGI middleware: `scope["state"]["owner"]` says whose request it is, for whoever is let in."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 499  # the client left before there was one

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            scope.setdefault("state", {})["owner"] = self._let_in(scope["path"], Headers(scope=scope))
            await self.app(scope, receive, counted)
        except Refused as error:
            await JSONResponse(error.body, error.status, error.headers)(scope, receive, counted)
        except Exception:
            status = 500
            raise
        finally:
            self.service.metrics.requests.labels(_place(scope["path"]), str(status)).inc()

    def _let_in(self, path: str, headers: Headers) -> str | None:
        """The owner; None for the page and /health, which are for everybody.

        Raises:
            Refused: 401, or 403 where there are no keys and the server is called by a name that may be anybody's.
        """
        if not self.service.options.api_key:
            _check_host(headers.get("host", ""))
        if path.count("/") == 1 and path != "/metrics":
            return None
        return self.service.owner(headers.get("authorization"))


def _check_host(host: str) -> None:
    """A page of the web can have its own name lead here, and then read all answers; addresses and bare names cannot."""
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        if "." in name.rstrip("."):
            message = f"without API keys the server is called by its address or as localhost, not as {name!r}"
            raise Refused(403, message, code="host_refused") from None


def _place(path: str) -> str:
    """The endpoint, without names that clients make up: labels of metrics must be few."""
    found = next((route for route in ROUTES if path == route or path.startswith(route + "/")), None)
    return found or (path if path in ("/", "/health", "/metrics") else "other")


async def read_body(http: Request, options: Options) -> bytes:
    """The JSON body of a request.

    Raises:
        Refused: 408 too slow, 413 too large, 415 not said to be JSON (which a page of another origin cannot say).
    """
    kind = http.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, f"expected Content-Type: application/json, got {kind or 'none'}")
    too_large = Refused(413, f"the body is larger than {options.most_body} bytes", code="body_too_large")
    size = http.headers.get("content-length", "")
    if size.isdecimal() and int(size) > options.most_body:
        raise too_large

    async def whole() -> bytes:
        body = bytearray()
        async for part in http.stream():
            body += part
            if len(body) > options.most_body:
                raise too_large
        return bytes(body)

    try:
        return await asyncio.wait_for(whole(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise Refused(408, f"the body did not come within {BODY_SECONDS} s") from None
    except ClientDisconnect:
        raise Refused(499, "the client left") from None
