"""Middleware of all endpoints: API keys, host names (DNS rebinding), request ids, and the count of requests."""

import ipaddress
import uuid
from hmac import compare_digest

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retentive.serve.errors import Refused
from retentive.serve.service import Service
from retentive.serve.sessions import owner_of

ROUTES = tuple(
    f"/v1/{name}"
    for name in ("chat/completions", "completions", "responses", "embeddings", "models", "states", "sessions", "info")
)
"""Endpoints that need an API key if there are keys. A name follows them in a path."""


class AccessMiddleware:
    """ASGI middleware that puts the `owner` and the `request_id` of an authorised request into `scope["state"]`."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service
        self.owners = {owner_of(key) for key in service.options.api_key}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # lifespan
            await self.app(scope, receive, send)
            return
        status, request_id = 499, uuid.uuid4().hex  # 499: the client left before there was a status

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        if scope["method"] == "HEAD":  # GET without the body, which uvicorn leaves out
            scope = {**scope, "method": "GET"}
        try:
            owner = self._authorize(scope, Headers(scope=scope))
            scope["state"] = {**scope.get("state", {}), "owner": owner, "request_id": request_id}
            await self.app(scope, receive, send_with_id)
        except Refused as error:
            await JSONResponse(error.body, error.status, error.headers)(scope, receive, send_with_id)
        except Exception:  # FastAPI's own handler outside of this answers 500
            status = 500
            raise
        finally:
            self.service.metrics.requests.labels(_endpoint(scope["path"]), str(status)).inc()

    def _authorize(self, scope: Scope, headers: Headers) -> str | None:
        """Returns the owner of the data that the request may see; None for the page and /health, which are public.

        Raises:
            Refused: 400 no Host header; 401 no valid key; 403 a Host of another site (DNS rebinding).
        """
        if scope["http_version"] == "1.1" and len(headers.getlist("host")) != 1:
            raise Refused(400, "HTTP/1.1 needs one Host header")
        if not self.owners:  # keys protect too, since a foreign page has none
            _prevent_dns_rebinding(headers.get("host", ""))
        # paths of one part are files of the page and /health
        if scope["path"].count("/") == 1 and scope["path"] != "/metrics":
            return None
        return self._owner(headers.get("authorization"))

    def _owner(self, authorization: str | None) -> str:
        """Returns the owner of an Authorization header's key; raises Refused (401) for an invalid key."""
        if not self.owners:
            return owner_of("")
        scheme, _, key = (authorization or "").partition(" ")
        owner = owner_of(key.strip())
        # all of them, each in constant time, so that the time reveals nothing about keys
        if scheme.lower() != "bearer" or not sum(compare_digest(owner, each) for each in self.owners):
            said = "wrong API key" if authorization else "an API key is needed: Authorization: Bearer KEY"
            raise Refused(401, said, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return owner


def _prevent_dns_rebinding(host: str) -> None:
    """Raises Refused (403) for a Host that is a public domain name.

    DNS rebinding: a web page makes its own domain resolve to this machine's address. For the browser the server then
    has the same origin, and the page can read all answers. IP addresses and names without a dot cannot be rebound.
    """
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host  # without the port; [::1] has none
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        if "." in name.rstrip("."):
            message = f"without API keys the server is called by its address or as localhost, not as {name!r}"
            raise Refused(403, message, code="host_refused") from None


def _endpoint(path: str) -> str:
    """Returns the endpoint of a path without client-chosen names, since a metric keeps every label forever."""
    found = next((route for route in ROUTES if path == route or path.startswith(route + "/")), None)
    return found or (path if path in ("/", "/health", "/metrics") else "other")
