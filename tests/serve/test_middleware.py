"""Access: which requests are accepted under which host name, without revealing secrets."""

import socket

import pytest

from retentive.serve.choices import Choice
from tests.serve.asked import CHAT, SAID, TEXT

KEYS = {"none": (None, 401), "wrong": ("Bearer c", 401), "basic": ("Basic a", 401), "bare": ("a", 401),
        "first": ("Bearer a", 200), "second": ("bearer b", 200), "part": ("Bearer", 401)}  # fmt: skip


def test_keys(serve):
    server = serve(api_key=("a", "b"))
    http = server.http()
    for name, (header, status) in KEYS.items():
        headers = {} if header is None else {"Authorization": header}
        for path in ("/v1/models", "/v1/info", "/v1/states", "/metrics"):
            assert http.get(path, headers=headers).status_code == status, (name, path)
        assert http.post(CHAT, json={"messages": SAID, "max_tokens": 1}, headers=headers).status_code == status
    for path in ("/health", "/"):
        assert http.get(path).status_code == 200
    assert http.get("/v1/models").headers["www-authenticate"] == "Bearer"


HOSTS = {"evil.example.org": 403, "evil.example.org:8000": 403, "127.0.0.1:8000": 200, "localhost": 200}
HOSTS |= {"[::1]:8000": 200, "192.168.1.5": 200, "retentive:8000": 200}


@pytest.mark.parametrize("host", HOSTS)
def test_without_keys_a_name_of_the_web_does_not_lead_in(retnet, host):
    assert retnet.http().get("/v1/models", headers={"Host": host}).status_code == HOSTS[host]


def test_no_secret_is_told(serve, capfd):
    server = serve(api_key=("sesame-1234",))
    server.http("sesame-1234").post(TEXT, json={"prompt": "a", "max_tokens": 1})
    server.http("sesame-12345").post(TEXT, json={"prompt": "a", "max_tokens": 1})
    metrics = server.http("sesame-1234").get("/metrics").text
    assert 'retentive_requests_total{path="/v1/completions",status="401"} 1.0' in metrics
    assert 'retentive_requests_total{path="/v1/completions",status="200"} 1.0' in metrics
    shown = capfd.readouterr()
    assert "sesame" not in metrics + shown.out + shown.err


def test_every_response_has_an_id_and_the_log_calls_the_request_by_it(retnet, monkeypatch, caplog):
    http = retnet.http()
    responses = [http.get("/health"), http.get("/nowhere"), http.post(TEXT, json={"prompt": "a", "max_tokens": 1})]
    ids = [response.headers["x-request-id"] for response in responses]
    assert len({*ids}) == 3 and all(len(id) == 32 for id in ids)

    def fails(*_):
        raise ArithmeticError("it does not add up")

    monkeypatch.setattr(Choice, "push", fails)
    failed = http.post(TEXT, json={"prompt": "a", "max_tokens": 1})
    assert failed.status_code == 500 and "it does not add up" in failed.json()["error"]["message"]
    assert f"request {failed.headers['x-request-id']} failed" in caplog.text


@pytest.mark.parametrize("hosts", [[], ["localhost", "localhost"]], ids=["none", "two"])
def test_http_1_1_needs_one_host(retnet, hosts):
    host, port = retnet.url.removeprefix("http://").split(":")
    lines = ["GET /health HTTP/1.1", *(f"Host: {name}" for name in hosts), "Connection: close", "", ""]
    with socket.create_connection((host, int(port)), timeout=20) as raw:
        raw.sendall("\r\n".join(lines).encode())
        assert raw.recv(1000).startswith(b"HTTP/1.1 400 ")
