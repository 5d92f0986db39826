"""The endpoints beside the completions, the page's files, pages of other origins, and paths that lead nowhere."""

import socket

from tests.serve.asked import CHAT, TEXT


def test_the_models(server):
    client, name = server.client(), server.service.name
    assert [m.id for m in client.models.list()] == [name]
    assert client.models.retrieve(name).owned_by == "retentive"


def test_health_is_that_of_the_engine(serve):
    server = serve()
    assert server.http().get("/health").json() == {"status": "ok"}
    server.service.engine.close()  # as if its thread had died
    assert server.http().get("/health").status_code == 503
    refused = server.http().post(TEXT, json={"prompt": "a"})
    assert refused.status_code == 503 and refused.json()["error"]["type"] == "server_error"


def test_the_page_comes_with_guards(retnet):
    response = retnet.http().get("/")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in response.headers["content-security-policy"]
    assert response.headers["cache-control"] == "no-store"
    assert retnet.http().get("/app.js").headers["content-type"].startswith("text/javascript")


def test_pages_of_other_origins_are_kept_out_unless_named(retnet, serve):
    asks = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in retnet.http().options(CHAT, headers=asks).headers
    assert "access-control-allow-origin" not in retnet.http().get("/v1/models", headers=asks).headers
    server = serve(cors=("https://example.org",), api_key=("a",))
    allowed = server.http().options(CHAT, headers={**asks, "Access-Control-Request-Headers": "authorization"})
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://example.org"
    asks["Origin"] = "https://example.com"
    assert "access-control-allow-origin" not in server.http().options(CHAT, headers=asks).headers


def test_places_that_are_not_there(retnet):
    http = retnet.http()
    for path in ("/docs", "/openapi.json", "/v1/nothing", "/app.py", "/..%2f..%2fapp.py", "/.git", "/page/app.js"):
        response = http.get(path)
        assert response.status_code == 404 and response.json()["error"]["type"] == "not_found_error", path
    assert http.get(CHAT).status_code == 405


def test_a_raw_path_does_not_leave_the_page(retnet):
    host, port = retnet.url.removeprefix("http://").split(":")
    for path in ("/../app.py", "/%2e%2e/app.py", "//etc/passwd", "/page/../../app.py"):
        with socket.create_connection((host, int(port)), timeout=10) as raw:
            raw.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            assert b" 404 " in raw.recv(1000).split(b"\r\n")[0], path
