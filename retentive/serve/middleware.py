"""What stands before every endpoint: API keys, the name that the server is called by, request ids, and the count."""

import ipaddress
import uuid
from hmac import compare_digest

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retentive.serve.errors import Refused
from retentive.serve.service import Service
from retentive.serve.sessions import owner_of

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/states", "/v1/sessions", "/v1/info")


class AccessMiddleware:
    """ASGI middleware: whoever is let in finds in `scope["state"]` the `owner` and the `request_id` of the request."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service
        self.owners = {owner_of(key) for key in service.options.api_key}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, request_id = 499, uuid.uuid4().hex  # 499: the client left before there was a status

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        if scope["method"] == "HEAD":  # GET without the body, which uvicorn leaves out
            scope = {**scope, "method": "GET"}
        try:
            owner = self._let_in(scope, Headers(scope=scope))
            scope["state"] = {**scope.get("state", {}), "owner": owner, "request_id": request_id}
            await self.app(scope, receive, noting)
        except Refused as error:
            await JSONResponse(error.body, error.status, error.headers)(scope, receive, noting)
        except Exception:
            status = 500
            raise
        finally:
            self.service.metrics.requests.labels(_endpoint(scope["path"]), str(status)).inc()

    def _let_in(self, scope: Scope, headers: Headers) -> str | None:
        """The owner; None for the page and /health, which are for everybody.

        Raises:
            Refused: 400 no name of the server; 401 no key; 403 a name that may be anybody's.
        """
        if scope["http_version"] == "1.1" and len(headers.getlist("host")) != 1:
            raise Refused(400, "HTTP/1.1 needs one Host header")
        if not self.owners:
            _prevent_dns_rebinding(headers.get("host", ""))
        if scope["path"].count("/") == 1 and scope["path"] != "/metrics":
            return None
        return self._owner(headers.get("authorization"))

    def _owner(self, authorization: str | None) -> str:
        """Whose key it is; raises Refused (401) if it is nobody's."""
        if not self.owners:
            return owner_of("")
        scheme, _, key = (authorization or "").partition(" ")
        owner = owner_of(key.strip())
        # all are compared, each in the same time
        if scheme.lower() != "bearer" or not sum(compare_digest(owner, each) for each in self.owners):
            said = "wrong API key" if authorization else "an API key is needed: Authorization: Bearer KEY"
            raise Refused(401, said, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return owner


def _prevent_dns_rebinding(host: str) -> None:
    """Raises Refused (403) for names of the web.

    DNS rebinding: a page has its own name lead to this machine's address, and then, being of the same origin, reads all
    answers. It cannot do that with an address or with a name that has no dot.
    """
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        if "." in name.rstrip("."):
            message = f"without API keys the server is called by its address or as localhost, not as {name!r}"
            raise Refused(403, message, code="host_refused") from None


def _endpoint(path: str) -> str:
    """The endpoint, without names that clients make up: labels of metrics must be few."""
    found = next((route for route in ROUTES if path == route or path.startswith(route + "/")), None)
    return found or (path if path in ("/", "/health", "/metrics") else "other")
