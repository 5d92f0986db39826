"""A short but complete soak: the server in its process, every kind of client, and the count of errors."""

import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("fastapi", reason="the server needs pip install 'retentive[serve]'")

from benchmarks import soak, soak_clients
from benchmarks.soak import Options
from benchmarks.soak_clients import Asked, Clients, Tally
from retentive.infer import SamplingParams

pytestmark = pytest.mark.slow


def test_a_short_soak_finds_nothing_wrong(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    many = soak_clients.requests
    monkeypatch.setattr(
        soak, "requests", lambda model, count, seed: many(model, count // 3, seed)
    )  # in a third of time
    result = soak.measure(Options(minutes=0.12))
    assert result["ok"], soak.table(result)
    assert result["alive"] and result["wrong_count"] == 0 and result["drained"]["exit_code"] == 0
    assert set(result["left_over"].values()) == {0}
    counts = result["counts"]
    assert counts["status 200"] > 20 and counts["stream checked"] > 5 and counts["aborted"] > 0
    assert soak.table(result).endswith("| wrong replies | 0 |")
    bad = soak.table({**result, "wrong_count": 1, "wrong": ["whole: got 'a', expected 'b'"]})
    assert bad.endswith("| wrong replies | 1 |\n\n- whole: got 'a', expected 'b'")
    soak.plot(result, tmp_path / "soak.png", title="t")
    assert (tmp_path / "soak.png").stat().st_size > 1000


def test_what_rounding_could_decide_is_not_asked():
    model, greedy = soak.tiny(0), SamplingParams(temperature=0)
    text = soak_clients.write(model, "a", greedy, 5, [])
    assert text
    first = text.encode()[0]
    with torch.no_grad():  # the first token is now as likely as another one
        model.head.weight[(first + 1) % 128] = model.head.weight[first] * (1 - 1e-6)
    assert soak_clients.write(model, "a", greedy, 5, []) is None


def test_a_wrong_reply_is_seen(monkeypatch):
    tally = Tally()
    clients = Clients(0, [Asked("/v1/completions", {"max_tokens": 1}, ["right"])], [], tally, flood=1)
    for status, text in ((200, "right"), (200, "wrong"), (500, "right"), (429, "")):
        monkeypatch.setattr(soak_clients, "ask", lambda *_, s=status, t=text, **__: (s, [t]))
        clients._reply("whole", clients.single[0])
    assert len(tally.wrong) == 2 and tally.counts["whole checked"] == 3


@pytest.fixture
def dying(monkeypatch):
    """A function that makes the next soak's server receive a signal after some seconds; the requests are few."""
    many, start = soak_clients.requests, soak.server
    monkeypatch.setattr(soak, "requests", lambda model, count, seed: many(model, 3, seed))
    monkeypatch.setattr(soak, "conversations", lambda model, count, seed: soak_clients.conversations(model, 1, seed))
    monkeypatch.setattr(soak, "long_requests", lambda *_: [])
    monkeypatch.setattr(soak_clients, "PATIENCE", 2.0)

    def prepare(number: int, seconds: float) -> None:
        @contextmanager
        def server(*arguments):
            with start(*arguments) as (process, port):
                timer = threading.Timer(seconds, process.send_signal, [number])
                timer.start()
                yield process, port
                timer.cancel()

        monkeypatch.setattr(soak, "server", server)

    return prepare


def test_a_server_that_dies_ends_the_soak_with_a_result(dying):
    dying(signal.SIGKILL, 1.5)
    result = soak.measure(Options(minutes=60))
    assert not result["ok"] and not result["alive"]
    assert "the server ended by itself" in result["gone"] and "exit code -9" in result["gone"]
    assert result["gone"] in soak.table(result) and result["wrong_count"]


def test_a_server_that_answered_nothing_has_a_table_and_a_picture(dying, monkeypatch, tmp_path):
    @contextmanager
    def dead(*_):
        with subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]) as process:
            process.wait()
            yield process, 1  # nobody listens at port 1

    monkeypatch.setattr(soak, "server", dead)
    result = soak.measure(Options(minutes=60))
    assert not result["ok"] and not result["samples"] and "exit code 3" in result["gone"]
    assert result["gone"] in soak.table(result)
    pytest.importorskip("matplotlib")
    soak.plot(result, tmp_path / "soak.png", title="t")


def test_a_server_that_no_longer_answers_ends_the_soak_with_a_result(dying):
    dying(signal.SIGSTOP, 1.5)
    result = soak.measure(Options(minutes=60))
    assert not result["ok"] and result["alive"] and result["samples"]
    assert "did not answer for 2 s: TimeoutError" in result["gone"]
    assert any("Timeout" in line for line in result["wrong"]), "the clients' own requests failed too"


def test_a_server_that_fails_when_the_clients_have_gone_is_named(dying, monkeypatch):
    dying(signal.SIGCONT, 0)  # harmless
    monkeypatch.setattr(soak, "settle", lambda port: soak.figures(1))
    result = soak.measure(Options(minutes=0.02))
    assert not result["ok"] and result["counts"]["status 200"]
    assert result["gone"].startswith("the server failed after its last client: ConnectionRefusedError")


def test_threads_lose_no_count():
    class Interrupted(Counter):
        """Between reading a count and writing it back, another thread has its turn."""

        def __getitem__(self, what):
            found = super().__getitem__(what)
            time.sleep(1e-3)
            return found

    tally = Tally(Interrupted())
    threads = [threading.Thread(target=tally.check, args=("whole", n, n)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert dict(tally.counts) == {"whole checked": 20}


def test_no_time_is_refused(refuses):
    with refuses("minutes must be above 0, got 0"):
        soak.measure(Options(minutes=0))
