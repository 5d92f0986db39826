"""The FastAPI application: OpenAI's endpoints, states and sessions, health, metrics, and the page.

    POST /v1/chat/completions, /v1/completions      GET /v1/models, /v1/models/{id}, /v1/info
    GET, POST /v1/states    POST /v1/states/{name}/restore    DELETE /v1/states/{name}, /v1/sessions/{name}
    GET /health, /metrics, /

What stands before them (keys, bodies, the count) is in `door.py`, what answers in `answer.py`.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from retentive.serve.answer import Answer
from retentive.serve.door import Door, read_body
from retentive.serve.errors import Refused
from retentive.serve.reply import Gone
from retentive.serve.service import Service
from retentive.serve.sessions import Session
from retentive.serve.wire import ChatRequest, CompletionRequest, Named, RestoreRequest, SaveRequest, read

PAGE = Path(__file__).parent / "page"
GRACE = 5
"""Seconds after the time-out in which a client may take what was written for it."""
GUARDS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def create_app(service: Service) -> FastAPI:
    """The application of a service; its engine's thread lives as long as the application does."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await asyncio.to_thread(service.engine.close)

    app = FastAPI(title="retentive", lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Door, service=service)
    if service.options.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.options.cors),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-Session-Id"],
            expose_headers=["Retry-After"],
        )
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(HTTPException, _no_such_place)
    app.add_exception_handler(Exception, _failed)
    _completions(app, service)
    _about(app, service)
    _states(app, service)
    _page(app)
    return app


def _completions(app: FastAPI, service: Service) -> None:
    async def answer(http: Request, kind: type[ChatRequest] | type[CompletionRequest]) -> Response:
        request = read(kind, await read_body(http, service.options))
        answer = Answer(service, http.state.owner, request, lambda: _leaves(http.receive))
        await answer.begin()
        if request.stream:
            return Events(answer, service.options.timeout + GRACE)
        try:
            return JSONResponse(await answer.whole())
        except Gone:
            return Response(status_code=499)  # nobody reads it; it is what the metrics count
        finally:
            answer.end()

    @app.post("/v1/chat/completions")
    async def chat(http: Request) -> Response:
        return await answer(http, ChatRequest)

    @app.post("/v1/completions")
    async def complete(http: Request) -> Response:
        return await answer(http, CompletionRequest)


async def _leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


class Events(Response):
    """An answer as server-sent events. A client that does not read is cut off when its time is out."""

    def __init__(self, answer: Answer, seconds: float):
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers, media_type="text/event-stream")
        del self.headers["content-length"]
        self.answer, self.seconds = answer, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task, late = asyncio.current_task(), []
        assert task is not None

        def cut_off() -> None:
            late.append(True)
            task.cancel()

        clock = asyncio.get_running_loop().call_later(self.seconds, cut_off)
        events = self.answer.events()
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except asyncio.CancelledError:
            if not late:
                raise
        finally:
            clock.cancel()
            await events.aclose()
            self.answer.end()


def _about(app: FastAPI, service: Service) -> None:
    model = {"id": service.name, "object": "model", "created": int(time.time()), "owned_by": "retentive"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return model

    @app.get("/v1/info")
    async def info() -> dict[str, Any]:
        return service.info()

    @app.get("/health")
    async def health() -> Response:
        if service.draining:
            return JSONResponse({"status": "draining"}, 503)
        if service.engine.thread is None or not service.engine.thread.is_alive():
            return JSONResponse({"status": "the engine has stopped"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _states(app: FastAPI, service: Service) -> None:
    sessions, saved = service.sessions, service.saved

    def named(name: str) -> str:
        return read(Named, json.dumps({"name": name}).encode()).name

    @app.get("/v1/states")
    async def states(http: Request) -> dict[str, Any]:
        return {"object": "list", "data": await asyncio.to_thread(saved.listed, http.state.owner)}

    @app.post("/v1/states")
    async def save(http: Request) -> dict[str, Any]:
        request = read(SaveRequest, await read_body(http, service.options))
        with sessions.lent(http.state.owner, request.session) as session:
            return await asyncio.to_thread(saved.save, http.state.owner, request.name, session)

    @app.post("/v1/states/{name}/restore")
    async def restore(http: Request, name: str) -> dict[str, Any]:
        request = read(RestoreRequest, await read_body(http, service.options))
        session: Session = await asyncio.to_thread(saved.load, http.state.owner, named(name))
        sessions.put(http.state.owner, request.session, session)
        return {"object": "session", "name": request.session, "tokens": session.tokens, "bytes": session.nbytes}

    @app.delete("/v1/states/{name}")
    async def delete(http: Request, name: str) -> dict[str, Any]:
        saved.delete(http.state.owner, named(name))
        return {"object": "state", "name": name, "deleted": True}

    @app.delete("/v1/sessions/{name}")
    async def forget(http: Request, name: str) -> dict[str, Any]:
        sessions.drop(http.state.owner, named(name))
        return {"object": "session", "name": name, "deleted": True}


def _page(app: FastAPI) -> None:
    """The files of the page, by name: what is not among them is not looked for."""
    files = {file.name: file for file in PAGE.iterdir() if file.is_file()} if PAGE.is_dir() else {}

    @app.get("/{name}")
    async def page(name: str) -> Response:
        if name not in files:
            raise HTTPException(404)
        return FileResponse(files[name], headers=GUARDS)

    @app.get("/")
    async def index() -> Response:
        return await page("index.html")


# errors


async def _refused(http: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return JSONResponse(error.body, error.status, error.headers)


async def _no_such_place(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = {404: "no such place", 405: "that place does not take this method"}.get(error.status_code, str(error.detail))
    refused = Refused(error.status_code, f"{said}: {http.method} {http.url.path}")
    return JSONResponse(refused.body, error.status_code, error.headers)


async def _failed(http: Request, error: Exception) -> Response:
    return JSONResponse(Refused(500, "the server failed; its log says more").body, 500)
