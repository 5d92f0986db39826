"""HTTP server: OpenAI's API over the engine, with sessions and saved states of constant size; extra `serve`.

    open_service(run)           (service.py) what is served: a model, its engine, its template, the sessions
    serve(service, host, port)  (server.py) answers until a signal
    create_app(service)         (app.py) the FastAPI application by itself

A request's way: uvicorn -> middleware -> app -> requests -> completion -> async_engine -> choices -> responses.
`options` and `sessions` load without the extra; the other modules need it.
"""
