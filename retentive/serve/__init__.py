"""The HTTP server: OpenAI's API over the engine, and what a state of constant size adds to it; extra `serve`.

    app.create_app(service)     the FastAPI application; run.serve runs it until a signal
    service.open_service(run)   what it serves: a model, its engine, its template, the sessions
    templates                   chats as token ids; needs jinja2 alone

`options`, `sessions` and `templates` load without the extra; the other modules need it.
"""
