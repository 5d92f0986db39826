"""Raw connections: what comes too large, too slowly or not at all is bounded, and the log stays quiet."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from retentive.serve import protocol
from tests.serve.asked import ENDLESS, TEXT

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


@contextmanager
def connected(server) -> Iterator[socket.socket]:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as raw:
        yield raw


def answer(raw: socket.socket) -> bytes:
    """All that the server says until it closes the connection."""
    said = b""
    while part := raw.recv(65536):
        said += part
    return said


def post(body: dict, *headers: str) -> bytes:
    content = json.dumps(body).encode()
    lines = [f"POST {TEXT} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(content)}", "", ""]).encode() + content


CHUNKED = post({}).replace(b"Content-Length: 2", b"Transfer-Encoding: chunked").removesuffix(b"{}")
LARGE = {
    "one-header": HEALTH + b"X: " + b"a" * 10**6,
    "many-headers": HEALTH + b"a:b\r\n" * 200_000,
    "path": b"GET /" + b"a" * 10**6,
    "blank-lines": b"\r\n" * 500_000,
    "trailer": CHUNKED + b"0\r\nX: " + b"a" * 10**6,
    "chunk-extension": CHUNKED + b"1;" + b"a" * 10**6,
}


@pytest.mark.parametrize("case", LARGE)
def test_heads_and_trailers_are_bounded(retnet, case):
    """Before any key is looked at: they are read to look for one."""
    with connected(retnet) as raw:
        said: list[bytes] = []
        reader = threading.Thread(target=lambda: said.append(answer(raw)))
        reader.start()
        raw.sendall(LARGE[case])
        reader.join()
    head, _, body = said[0].rpartition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
    assert json.loads(body)["error"]["message"] == "the head of a request is larger than 65536 bytes"


def test_what_is_within_the_bound_is_served(retnet):
    with connected(retnet) as raw:
        raw.sendall(HEALTH + b"X: " + b"a" * 60_000 + b"\r\n\r\n" + HEALTH + b"Connection: close\r\n\r\n")
        assert answer(raw).count(b"HTTP/1.1 200 OK") == 2
    # a body is not a head
    large = {"prompt": "a", "max_tokens": 1, "user": "b" * 90_000}
    with connected(retnet) as raw:
        raw.sendall(post(large) + post(large, "Connection: close"))
        assert answer(raw).count(b"HTTP/1.1 200 OK") == 2


SLOW = {
    "silent": (b"", b""),
    "head": (HEALTH, b"HTTP/1.1 408 Request Timeout"),
    "body": (post({"prompt": "a" * 100})[:-1], b"HTTP/1.1 408 Request Timeout"),
    "next-head": (HEALTH + b"\r\n" + HEALTH, b"HTTP/1.1 408 Request Timeout"),
}


@pytest.mark.parametrize("case", SLOW)
def test_nobody_is_waited_for_longer_than_the_time_out(serve, case, monkeypatch):
    monkeypatch.setattr(protocol, "GRACE", 0.2)
    sent, words = SLOW[case]
    server = serve(timeout=0.3)
    with connected(server) as raw:
        raw.sendall(sent[:-5])
        raw.sendall(sent[-5:])
        said = answer(raw)  # it comes back, so the server has closed
    assert (words in said) if words else said == b""


def test_a_byte_now_and_then_gains_no_time(serve):
    server = serve(timeout=0.5)
    with connected(server) as raw:
        stop = threading.Event()

        def trickle() -> None:
            while not stop.wait(0.05):
                raw.send(b"a")

        raw.sendall(HEALTH + b"X: ")
        thread = threading.Thread(target=trickle)
        thread.start()
        said = raw.recv(1000)
        stop.set()
        thread.join()
    assert said.startswith(b"HTTP/1.1 408 ")


OFFERS = {
    "websocket": b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: YQ==\r\n",
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n",
}


@pytest.mark.parametrize("case", OFFERS)
def test_offers_to_upgrade_are_ignored_in_silence(retnet, case, caplog, capfd):
    with connected(retnet) as raw:
        raw.sendall(HEALTH + OFFERS[case] + b"\r\n" + HEALTH + b"Connection: close\r\n\r\n")
        assert answer(raw).count(b'{"status":"ok"}') == 2
    assert caplog.text == "" and capfd.readouterr().err == ""


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_body_comes_with_an_offer_to_upgrade(retnet, chunked, parts):
    """As from Java's HTTP clients and `curl --http2`; what looks like a request in it is none."""
    inner = HEALTH.decode() + "\r\n"
    larger_than_a_head = "b" * 90_000
    body_of = {"prompt": inner, "echo": True, "max_tokens": 0, "user": larger_than_a_head}
    sent = post(body_of, OFFERS["h2c"].decode().removesuffix("\r\n"))
    if chunked:
        head, body = sent.split(b"\r\n\r\n", 1)
        head = head.replace(b"Content-Length: %d" % len(body), b"Transfer-Encoding: chunked")
        sent = head + b"\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    sent += HEALTH + b"Connection: close\r\n\r\n"
    size = -(-len(sent) // parts)
    with connected(retnet) as raw:
        for begin in range(0, len(sent), size):
            raw.sendall(sent[begin : begin + size])
        said = answer(raw).decode()
    assert said.count("HTTP/1.1 200 OK") == 2 and said.count('{"status":"ok"}') == 1
    assert f'"text":{json.dumps(inner)}' in said


def test_nonsense_is_refused_in_silence(retnet, caplog, capfd):
    for nonsense in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"nonsense\r\n\r\n"):
        with connected(retnet) as raw:
            raw.sendall(nonsense)
            said = answer(raw)
        assert said.startswith(b"HTTP/1.1 400 Bad Request") and b"not HTTP/1.1" in said
    assert caplog.text == "" and capfd.readouterr().err == ""


def test_pipelined_requests_are_answered_in_order(retnet):
    bodies = [{"prompt": [65 + n], "max_tokens": 4, "echo": True, "seed": n} for n in range(3)]
    with connected(retnet) as raw:
        raw.sendall(b"".join(map(post, bodies)) + HEALTH + b"Connection: close\r\n\r\n")
        said = answer(raw).decode("utf-8", "replace")
    assert said.count("HTTP/1.1 200 OK") == 4
    assert said.index('"text":"A') < said.index('"text":"B') < said.index('"text":"C') < said.index('{"status":"ok"}')


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_who_pipelines_and_leaves_frees_the_slot_in_silence(serve, stream, eventually, caplog, capfd):
    server = serve(slots=1, max_tokens=10**6)
    with connected(server) as raw:
        raw.sendall(post({**ENDLESS, "stream": stream}) + HEALTH + b"\r\n" + HEALTH + b"\r\n")
        assert eventually(lambda: server.service.engine.counts["tokens"] > 5)
    assert server.idle()
    server.stop()
    assert caplog.text == "" and capfd.readouterr().err == ""
