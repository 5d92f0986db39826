"""Who is let in, and under which name; and that no secret is told."""

import pytest

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
