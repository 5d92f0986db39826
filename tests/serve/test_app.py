"""The endpoints beside the completions, the page's files, pages of other origins, and paths that lead nowhere."""

import json
import socket

from tests.serve.asked import CHAT, GREEDY, TEXT


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
    names = "authorization,content-type,x-stainless-os"  # as OpenAI's client in a page sends them
    allowed = server.http().options(CHAT, headers={**asks, "Access-Control-Request-Headers": names})
    assert allowed.status_code == 200 and allowed.headers["access-control-allow-headers"] == names
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


def test_head_is_get_without_the_body(retnet):
    http = retnet.http()
    for path in ("/health", "/", "/v1/models", "/app.js"):
        head, got = http.head(path), http.get(path)
        assert head.status_code == 200 and head.content == b"" != got.content, path
        assert head.headers["content-length"] == str(len(got.content))


def test_a_client_of_http_1_0_gets_a_stream_with_its_length(retnet):
    body = json.dumps({"prompt": "Once", "max_tokens": 9, "stream": True, **GREEDY}).encode()
    lines = [f"POST {TEXT} HTTP/1.0", "Content-Type: application/json", f"Content-Length: {len(body)}", "", ""]
    host, port = retnet.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as raw:
        raw.sendall("\r\n".join(lines).encode() + body)
        said = b""
        while part := raw.recv(65536):
            said += part
    head, _, events = said.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head and f"content-length: {len(events)}".encode() in head
    chunks = [json.loads(line[6:]) for line in events.splitlines() if line.startswith(b"data: {")]
    text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
    assert text == retnet.text([256, *b"Once"], max_tokens=9, **GREEDY) and events.endswith(b"data: [DONE]\n\n")
