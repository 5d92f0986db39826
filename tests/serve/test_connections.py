"""Raw connections: bounds of heads and bodies, pipelining and offers to upgrade, with a quiet log."""

import contextlib
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

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
MUCH = 2**24  # more than the kernel keeps of a connection
LARGE = {
    "one-header": HEALTH + b"X: " + b"a" * MUCH,
    "many-headers": HEALTH + b"a:b\r\n" * (MUCH // 5),
    "path": b"GET /" + b"a" * MUCH,
    "blank-lines": b"\r\n" * (MUCH // 2),
    "trailer": CHUNKED + b"0\r\nX: " + b"a" * MUCH,
    "chunk-extension": CHUNKED + b"1;" + b"a" * MUCH,
    "body": CHUNKED + (b"10000\r\n" + b"a" * 65536 + b"\r\n") * (MUCH // 65536),
}


@pytest.mark.parametrize("case", LARGE)
def test_heads_trailers_and_bodies_are_bounded(serve, case, caplog, capfd):
    """The server closes the connection, before any key is looked at; a client that sends on may lose the 400 or 413."""
    server = serve(max_prompt=10)
    with connected(server) as raw, pytest.raises(ConnectionError):
        raw.sendall(LARGE[case])
    assert server.http().get("/health").status_code == 200
    assert caplog.text == "" and capfd.readouterr().err == ""


@pytest.mark.parametrize("case", ["one-header", "path", "trailer"])
def test_a_head_that_is_a_little_too_large_is_answered(retnet, case):
    with connected(retnet) as raw:
        raw.sendall(LARGE[case][:65_000])
        raw.sendall(LARGE[case][65_000:66_000])  # in one packet, so that the server closes with nothing unread
        assert answer(raw).startswith(b"HTTP/1.1 400 ")


def test_what_is_within_the_bound_is_served(retnet):
    with connected(retnet) as raw:
        raw.sendall(HEALTH + b"X: " + b"a" * 60_000 + b"\r\n\r\n" + HEALTH + b"Connection: close\r\n\r\n")
        assert answer(raw).count(b"HTTP/1.1 200 OK") == 2
    # a body is not a head
    large = {"prompt": "a", "max_tokens": 1, "user": "b" * 90_000}
    with connected(retnet) as raw:
        raw.sendall(post(large) + post(large, "Connection: close"))
        assert answer(raw).count(b"HTTP/1.1 200 OK") == 2


def test_a_body_that_does_not_come_in_time_is_refused(serve):
    with connected(serve(timeout=0.3)) as raw:
        raw.sendall(post({"prompt": "a" * 100})[:-1])
        said = answer(raw)  # it comes back, so the server has closed
    assert said.startswith(b"HTTP/1.1 408 Request Timeout") and b"the body did not come within 0.3 s" in said


def test_a_body_byte_by_byte_gains_no_time(serve):
    with connected(serve(timeout=0.5)) as raw:
        raw.sendall(post({"prompt": "a" * 10_000})[:-9_000])
        raw.settimeout(0.05)
        for _ in range(200):  # 10 s
            with contextlib.suppress(TimeoutError):
                said = raw.recv(1000)
                break
            raw.send(b"a")
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
        assert said.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 404 ")) and b"Invalid HTTP request" in said
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
