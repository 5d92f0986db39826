"""A short soak, whole: the server in its process, every kind of client, and the count of what went wrong."""

import json
import sys

import pytest

pytest.importorskip("fastapi", reason="the server needs pip install 'retentive[serve]'")

from retentive.bench import soak, soak_clients
from retentive.bench.soak_clients import Asked, Clients, Tally
from retentive.cli import main


def test_a_short_soak_finds_nothing_wrong(tmp_path, capsys):
    out = tmp_path / "soak.json"
    main(["bench", "soak", "--minutes", "0.12", "--json", str(out)])
    result = json.loads(out.read_text())
    assert result["ok"] and result["alive"] and result["wrong_count"] == 0 and result["drained"]["exit_code"] == 0
    assert set(result["left_over"].values()) == {0}
    counts = result["counts"]
    assert counts["status 200"] > 20 and counts["stream checked"] > 5 and counts["aborted"] > 0
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert "wrong replies" in capsys.readouterr().out


def test_a_wrong_reply_is_seen(monkeypatch):
    tally = Tally()
    clients = Clients(0, [Asked("/v1/completions", {"max_tokens": 1}, ["right"])], [], tally, flood=1)
    for status, text in ((200, "right"), (200, "wrong"), (500, "right"), (429, "")):
        monkeypatch.setattr(soak_clients, "ask", lambda *_, s=status, t=text, **__: (s, [t]))
        clients._reply("whole", clients.single[0])
    assert len(tally.wrong) == 2 and tally.counts["whole checked"] == 3


def test_no_server_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(OSError, match="the server did not start"), soak.server(soak.tiny(0)):
        pass
