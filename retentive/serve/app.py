"""The FastAPI application: OpenAI's endpoints, states and sessions, health, metrics, and the page.

    POST /v1/chat/completions, /v1/completions, /v1/responses, /v1/embeddings
    GET /v1/models, /v1/models/{id}, /v1/info
    GET, POST /v1/states    GET, PUT, DELETE /v1/states/{name}    POST /v1/states/{name}/restore
    DELETE /v1/sessions/{name}
    GET /health, /metrics, /

API keys, host names and the count of requests are in `middleware.py`; completions are made in `completion.py`.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from retentive.infer.memory import Memory
from retentive.page import FILES
from retentive.serve.completion import ClientLeft, Completion, described
from retentive.serve.embeddings import embeddings
from retentive.serve.errors import Refused
from retentive.serve.items import InputRequest
from retentive.serve.middleware import AccessMiddleware
from retentive.serve.receive import parse, receive, receive_file
from retentive.serve.requests import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Named,
    RestoreRequest,
    SaveRequest,
)
from retentive.serve.responses import to_json
from retentive.serve.service import Service

GRACE = 5
"""Seconds after a request's time-out in which a client may still read its response."""
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; media-src blob:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
"""Headers of the page's files. The page needs only its own scripts and the media of messages. No page may frame it."""


def create_app(service: Service) -> FastAPI:
    """Returns the application that serves `service`. The engine's thread runs from startup to shutdown."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for each in service.all:
            each.engine.start()
        yield
        # waits for requests in flight, whose readers need the event loop meanwhile
        await asyncio.gather(*(asyncio.to_thread(each.engine.close) for each in service.all))

    app = FastAPI(title="retentive", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    # the last one added is outermost: CORS preflights carry no key, and are answered before keys are checked
    app.add_middleware(AccessMiddleware, service=service)
    if service.options.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.options.cors),
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["*"],  # clients send their own headers, such as x-stainless-* of OpenAI's
            expose_headers=["Retry-After", "X-Request-Id"],
        )
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _failed)
    _completions(app, service)
    _about(app, service)
    _states(app, service)
    _page(app)
    return app


def _completions(app: FastAPI, service: Service) -> None:
    """Adds the routes of completions."""

    async def complete(http: Request, kind: type[ChatRequest | CompletionRequest | InputRequest]) -> Response:
        received = await receive(http, kind, service.options, media=service.open_media is not None)
        request = received.as_chat(service.kept, http.state.owner) if isinstance(received, InputRequest) else received
        completion = Completion(service.named(request.model), request, http.state.owner, http.state.request_id)
        try:
            await completion.begin(lambda: _disconnect(http.receive))
            if not request.stream:
                return Response(await completion.whole(), media_type="application/json")
        except ClientLeft:
            return Response(status_code=499)  # for the metrics, since nobody reads it
        finally:
            if not request.stream:
                completion.close()
        return EventStream(completion, service.options.timeout + GRACE)  # outlives this call, and closes the completion

    @app.post("/v1/chat/completions")
    async def chat_completions(http: Request) -> Response:
        return await complete(http, ChatRequest)

    @app.post("/v1/completions")
    async def completions(http: Request) -> Response:
        return await complete(http, CompletionRequest)

    @app.post("/v1/responses")
    async def responses(http: Request) -> Response:
        return await complete(http, InputRequest)

    @app.post("/v1/embeddings")
    async def embed(http: Request) -> Response:
        request = await receive(http, EmbeddingRequest, service.options)
        return Response(to_json(await embeddings(service, request)), media_type="application/json")


async def _disconnect(receive: Receive) -> None:
    """Returns when the client has closed the connection. Read the body first, since its messages come first."""
    while (await receive())["type"] != "http.disconnect":
        continue


class EventStream(Response):
    """Completion as server-sent events, cut off after `seconds` in case the client has stopped reading."""

    def __init__(self, completion: Completion, seconds: float):
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # so that no proxy holds events back
        super().__init__(headers=headers, media_type="text/event-stream")
        del self.headers["content-length"]  # Starlette's, of an empty body
        self.completion, self.seconds = completion, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task, cut_off = asyncio.current_task(), False
        assert task is not None

        def cut() -> None:
            nonlocal cut_off
            cut_off = True
            task.cancel()

        # `send` waits forever for a client that does not read
        timer = asyncio.get_running_loop().call_later(self.seconds, cut)
        events = self.completion.events()
        try:
            if scope["http_version"] == "1.0":  # has no chunked encoding: all events at once, with a length
                body = b"".join([event async for event in events])
                self.headers["content-length"] = str(len(body))
                await self._start(send)
                await send({"type": "http.response.body", "body": body, "more_body": False})
                return
            await self._start(send)
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except asyncio.CancelledError:
            if not cut_off:  # the server itself is stopping
                raise
        finally:
            timer.cancel()
            await events.aclose()  # its `finally` blocks run now, not when it is garbage-collected
            self.completion.close()

    async def _start(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})


def _about(app: FastAPI, service: Service) -> None:
    """Adds the routes that describe the model and the server's health."""
    began = int(time.time())

    def described_model(name: str) -> dict[str, Any]:
        return {"id": service.named(name).name, "object": "model", "created": began, "owned_by": "retentive"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described_model(each.name) for each in service.all]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return described_model(name)

    @app.get("/v1/info")
    async def info(model: str | None = None) -> dict[str, Any]:
        return service.named(model).info()

    @app.get("/health")
    async def health() -> Response:
        if service.draining:
            return JSONResponse({"status": "draining"}, 503)
        if any(each.engine.thread is None or not each.engine.thread.is_alive() for each in service.all):
            return JSONResponse({"status": "the engine has stopped"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _states(app: FastAPI, service: Service) -> None:
    """Adds the routes of saved states and sessions; `model` names an adapter, whose states are apart.

    Threads read and write files, since a state may have 100 MB.
    """

    def named(name: str) -> str:
        """Returns a name from the path, checked as a name in a body."""
        return parse(Named, json.dumps({"name": name}).encode()).name

    @app.get("/v1/states")
    async def states(http: Request, model: str | None = None) -> dict[str, Any]:
        saved = service.named(model).saved
        return {"object": "list", "data": await asyncio.to_thread(saved.listed, http.state.owner)}

    @app.post("/v1/states")
    async def save(http: Request) -> dict[str, Any]:
        request = await receive(http, SaveRequest, service.options)
        of = service.named(request.model)
        # checked out while a thread writes it, so that no request changes the session
        with of.sessions.checkout(http.state.owner, request.session) as conversation:
            return await asyncio.to_thread(of.saved.save, http.state.owner, request.name, conversation.memory)

    @app.post("/v1/states/{name}/restore")
    async def restore(http: Request, name: str) -> dict[str, Any]:
        request = await receive(http, RestoreRequest, service.options)
        of = service.named(request.model)
        memory: Memory = await asyncio.to_thread(of.saved.load, http.state.owner, named(name))
        conversation = of.sessions.put(http.state.owner, request.session, memory)
        return {"object": "session", **described(request.session, conversation)}

    @app.get("/v1/states/{name}")
    async def download(http: Request, name: str, model: str | None = None) -> Response:
        path = service.named(model).saved.path(http.state.owner, named(name))
        return FileResponse(path, filename=path.name, media_type="application/octet-stream", headers=SECURITY_HEADERS)

    @app.put("/v1/states/{name}")
    async def upload(http: Request, name: str, model: str | None = None) -> dict[str, Any]:
        of = service.named(model)
        content = await receive_file(http, of.options, of.largest_state)
        return await asyncio.to_thread(of.saved.add, http.state.owner, named(name), content)

    @app.delete("/v1/states/{name}")
    async def delete(http: Request, name: str, model: str | None = None) -> dict[str, Any]:
        await asyncio.to_thread(service.named(model).saved.delete, http.state.owner, named(name))
        return {"object": "state", "name": name, "deleted": True}

    @app.delete("/v1/sessions/{name}")
    async def forget(http: Request, name: str, model: str | None = None) -> dict[str, Any]:
        service.named(model).sessions.drop(http.state.owner, named(name))
        return {"object": "session", "name": name, "deleted": True}


def _page(app: FastAPI) -> None:
    """Adds the page's files. Names are looked up in a fixed list, so that no path can leave the folder."""
    files = {file.name: file for file in FILES}

    @app.get("/{name}")
    async def page(name: str) -> Response:
        if name not in files:
            raise HTTPException(404)
        return FileResponse(files[name], headers=SECURITY_HEADERS)

    @app.get("/")
    async def index() -> Response:
        return await page("index.html")


# errors


async def _refused(http: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return JSONResponse(error.body, error.status, error.headers)


async def _http_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: "no such path", 405: "that path does not take this method"}
    said = words.get(error.status_code, str(error.detail))
    refused = Refused(error.status_code, f"{said}: {http.method} {http.url.path}")
    return JSONResponse(refused.body, error.status_code, error.headers)


async def _failed(http: Request, error: Exception) -> Response:
    return JSONResponse(Refused(500, "the server failed; its log says more").body, 500)
