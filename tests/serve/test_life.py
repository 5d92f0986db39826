"""Clients that leave or do not read, figures of the metrics, and the end: a signal lets the running ones finish."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from retentive.cli import main

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ENDLESS = {"prompt": "a", "max_tokens": 10**6, "logit_bias": {"256": -100}}


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_frees_its_slot(serve, stream, eventually):
    server = serve(slots=1, max_tokens=10**6)
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({**ENDLESS, "stream": stream}).encode()
    with socket.create_connection((host, int(port))) as raw:
        head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert eventually(lambda: server.service.engine.counts["tokens"] > 5)
    assert server.idle()
    assert server.http().post(TEXT, json={"prompt": "b", "max_tokens": 2}).status_code == 200


def test_a_client_that_leaves_the_queue_is_forgotten(serve, eventually):
    server = serve(slots=1, queue=1, max_tokens=10**6)
    http = server.http()
    with http.stream("POST", TEXT, json={**ENDLESS, "stream": True}) as first:
        lines = first.iter_lines()
        next(lines)
        with pytest.raises(httpx.ReadTimeout):
            http.post(TEXT, json={"prompt": "b"}, timeout=0.3)
        assert eventually(lambda: not server.service.engine.queue)
    assert server.idle()


def test_a_client_that_does_not_read_holds_no_slot_and_is_cut_off(serve, eventually):
    server = serve(slots=1, max_tokens=20_000, timeout=3)
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({**ENDLESS, "max_tokens": 3000, "stream": True, "logprobs": 20}).encode()
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect((host, int(port)))
        head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert eventually(lambda: server.service.engine.counts["tokens"] > 100)
        # the slot is free again while the answer waits to be read
        other = server.http().post(TEXT, json={"prompt": "b", "max_tokens": 2})
        assert other.status_code == 200 and server.service.in_flight == 1
        assert server.idle()


def test_the_metrics(serve):
    server = serve(slots=3)
    http = server.http()
    for prompt in ("a" * 600, "a" * 600):
        assert http.post(TEXT, json={"prompt": prompt, "max_tokens": 7, "temperature": 0}).status_code == 200
    http.post(TEXT, json={"prompt": 3})
    http.post(CHAT, json={"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "session": "s"})
    lines = dict(line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines() if not line.startswith("#"))
    figures = {name: float(value) for name, value in lines.items()}
    assert figures['retentive_requests_total{path="/v1/completions",status="200"}'] == 2
    assert figures['retentive_requests_total{path="/v1/completions",status="400"}'] == 1
    assert figures["retentive_slots"] == 3 and figures["retentive_running"] == figures["retentive_queue_length"] == 0
    assert figures["retentive_generated_tokens_total"] == 17
    assert figures["retentive_cached_tokens_total"] == 600 and figures["retentive_cache_hits_total"] == 1
    assert figures["retentive_time_to_first_token_seconds_count"] == 3
    assert figures["retentive_time_per_token_seconds_count"] == 3
    assert 0 < figures["retentive_time_to_first_token_seconds_sum"] < figures["retentive_request_seconds_sum"]
    assert figures["retentive_sessions"] == 1 and figures["retentive_session_bytes"] > 8000
    assert figures["retentive_pool_bytes"] > 3 * 8000 and figures["retentive_cache_bytes"] > 0


def test_health_is_that_of_the_engine(serve):
    server = serve()
    assert server.http().get("/health").json() == {"status": "ok"}
    server.service.engine.close()  # as if its thread had died
    assert server.http().get("/health").status_code == 503
    refused = server.http().post(TEXT, json={"prompt": "a"})
    assert refused.status_code == 503 and refused.json()["error"]["type"] == "server_error"


def test_the_info_for_the_page(server):
    info = server.http().get("/v1/info").json()
    model = server.service.model
    assert info["model"] == server.service.name and info["kind"] == type(model).__name__
    assert info["parameters"] == sum(p.numel() for p in model.parameters())
    assert info["state_bytes"] == model.init_state(1).nbytes and info["context"] is None and info["chat"] is False


def test_the_page_comes_with_guards(retnet):
    response = retnet.http().get("/")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in response.headers["content-security-policy"]
    assert response.headers["cache-control"] == "no-store"
    assert retnet.http().get("/app.js").headers["content-type"].startswith("text/javascript")


# a process of its own


@pytest.fixture
def process(runs, tmp_path):
    """`process(*options)`: (the process, its URL), of `retentive serve`."""
    started = []

    def start(*options: str) -> tuple[subprocess.Popen, str]:
        command = [sys.executable, "-m", "retentive", "serve", str(runs / "retnet"), "--port", "0", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RETENTIVE_API_KEY": "sesame"}
        child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path)
        started.append(child)
        line = child.stderr.readline()
        assert line.startswith("retentive: serving retnet on http://127.0.0.1:"), line + child.stderr.read()
        return child, line.split()[-1]

    yield start
    for child in started:
        child.kill()
        child.wait()
        child.stderr.close()


def listen(url: str, tokens: int, into: list) -> threading.Thread:
    """A thread that reads a stream of so many tokens; `into` gets its lines."""

    def read() -> None:
        body = {**ENDLESS, "max_tokens": tokens, "stream": True}
        with httpx.stream("POST", url + TEXT, json=body, headers=KEY, timeout=60) as response:
            into.extend(response.iter_lines())

    thread = threading.Thread(target=read)
    thread.start()
    return thread


KEY = {"Authorization": "Bearer sesame"}


def running(url: str) -> float:
    lines = httpx.get(url + "/metrics", headers=KEY).text.splitlines()
    return float(next(line for line in lines if line.startswith("retentive_running")).split()[1])


def test_a_signal_lets_the_running_ones_finish(process, eventually):
    child, url = process()
    lines: list[str] = []
    thread = listen(url, 4000, lines)
    assert eventually(lambda: running(url) == 1)
    child.send_signal(signal.SIGTERM)
    assert eventually(lambda: httpx.get(url + "/health").status_code == 503)
    refused = httpx.post(url + TEXT, json={"prompt": "b"}, headers=KEY)
    assert refused.status_code == 503 and "stopping" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) > 0
    thread.join()
    assert lines[-2] == "data: [DONE]" and '"finish_reason":"length"' in lines[-4]
    assert child.wait(timeout=30) == 0
    assert "SIGTERM: finishing 1 requests" in child.stderr.read()


def test_a_second_signal_ends_it_at_once(process, eventually):
    child, url = process("--max-tokens", "1000000")
    with httpx.stream("POST", url + TEXT, json={**ENDLESS, "stream": True}, headers=KEY) as response:
        lines = response.iter_lines()
        next(lines)
        child.send_signal(signal.SIGINT)
        assert eventually(lambda: httpx.get(url + "/health").status_code == 503)
        began = time.monotonic()
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=30) == 128 + signal.SIGTERM
    assert time.monotonic() - began < 25  # the stream would have gone on for minutes


BAD = {
    "no-model": (["nowhere"], "no model folder at nowhere"),
    "no-slots": (["{run}", "--slots", "0"], "--slots must be above 0"),
    "no-port": (["{run}", "--port", "70000"], "--port must be from 0 to 65535"),
    "no-template": (["{run}", "--template", "nothing"], "no chat template at nothing"),
    "no-address": (["{run}", "--host", "203.0.113.7"], "cannot listen on 203.0.113.7:8000"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_command_lines_end_in_one_line(case, runs, capsys):
    argv, words = BAD[case]
    with pytest.raises(SystemExit) as stop:
        main(["serve", *(a.format(run=runs / "retnet") for a in argv)])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.startswith("retentive: ") and line.count("\n") == 1 and words in line


def test_a_missing_extra_is_named(runs, capsys, monkeypatch):
    for name in [n for n in sys.modules if n.startswith("retentive.serve.") and not n.endswith("options")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit):
        main(["serve", str(runs / "retnet")])
    assert "pip install 'retentive[serve]'" in capsys.readouterr().err
