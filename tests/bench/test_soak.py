"""A short soak, whole: the server in its process, every kind of client, and the count of what went wrong."""

import pytest

pytest.importorskip("fastapi", reason="the server needs pip install 'retentive[serve]'")

from retentive.bench import soak, soak_clients
from retentive.bench.soak import Options
from retentive.bench.soak_clients import Asked, Clients, Tally


def test_a_short_soak_finds_nothing_wrong(tmp_path):
    pytest.importorskip("matplotlib")
    result = soak.measure(Options(minutes=0.12))
    assert result["ok"] and result["alive"] and result["wrong_count"] == 0 and result["drained"]["exit_code"] == 0
    assert set(result["left_over"].values()) == {0}
    counts = result["counts"]
    assert counts["status 200"] > 20 and counts["stream checked"] > 5 and counts["aborted"] > 0
    assert soak.table(result).endswith("| wrong replies | 0 |")
    bad = soak.table({**result, "wrong_count": 1, "wrong": ["whole: got 'a', expected 'b'"]})
    assert bad.endswith("| wrong replies | 1 |\n\n- whole: got 'a', expected 'b'")
    soak.plot(result, tmp_path / "soak.png", title="t")
    assert (tmp_path / "soak.png").stat().st_size > 1000


def test_a_wrong_reply_is_seen(monkeypatch):
    tally = Tally()
    clients = Clients(0, [Asked("/v1/completions", {"max_tokens": 1}, ["right"])], [], tally, flood=1)
    for status, text in ((200, "right"), (200, "wrong"), (500, "right"), (429, "")):
        monkeypatch.setattr(soak_clients, "ask", lambda *_, s=status, t=text, **__: (s, [t]))
        clients._reply("whole", clients.single[0])
    assert len(tally.wrong) == 2 and tally.counts["whole checked"] == 3


def test_no_time_is_refused(refuses):
    with refuses("--minutes must be above 0, got 0"):
        soak.measure(Options(minutes=0))
