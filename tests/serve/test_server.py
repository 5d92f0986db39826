"""`retentive serve` in a process: a signal lets the running ones finish; and command lines that are refused."""

import os
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest

from retentive.cli import main
from tests.serve.asked import ENDLESS, TEXT


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
    assert "SIGTERM: finishing 1 request" in child.stderr.read()


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
    "no-slots": (["{run}", "--slots", "0"], "--slots 0: must be above 0"),
    "no-port": (["{run}", "--port", "70000"], "--port must be from 0 to 65535"),
    "no-template": (["{run}", "--template", "nothing"], "no chat template at nothing"),
    "states-a-file": (["{run}", "--states", "{run}/config.json"], "config.json: a file; name a folder"),
    "too-many-slots": (["{run}", "--slots", "1000000000"], "--slots 1000000000: they need"),
    "no-origin": (["{run}", "--cors", "junk"], "--cors junk: expected * or an origin"),
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
