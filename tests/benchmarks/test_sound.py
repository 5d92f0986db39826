"""`bench sound`: reads sound once for all questions, and refuses bad options."""

import json

import pytest

pytest.importorskip("soundfile", reason="sound needs pip install 'retentive[multimodal]'")
pytest.importorskip("soxr", reason="sound needs pip install 'retentive[multimodal]'")
pytest.importorskip("jinja2", reason="chat templates need pip install 'retentive[serve]'")

from benchmarks import sound
from benchmarks.sound import Options

FEW = {"size": "tiny", "minutes": (0.1, 0.05), "questions": (1, 3), "reply": 2, "repeats": 1}


def test_sound_is_read_once_for_all_questions(sizes, monkeypatch):
    read, real = [], sound.remember
    monkeypatch.setattr(sound, "remember", lambda *given: read.append(given[2][0].name) or real(*given))
    result = sound.measure(Options(**FEW))
    # a first one that warms up, each length, and two numbers of questions in two turns
    assert len(read) == 1 + 2 + 4
    short, long = result["rows"]
    assert (short["minutes"], long["minutes"]) == (0.05, 0.1)
    # 25 rows a second, the last one filled up, and the beginning of a message
    assert long["tokens"] - short["tokens"] == pytest.approx(75, abs=1) and short["tokens"] > 75
    assert short["state_bytes"] == long["state_bytes"] and short["times_real_time"] > 0
    assert [row["questions"] for row in result["questions"]] == [1, 3] and result["questions"][0]["ratio"] == 1
    assert sound.table(result).count("\n") == 8 and json.dumps(result)


def test_what_is_refused(refuses):
    with refuses("minutes must be above 0"):
        sound.measure(Options(**{**FEW, "minutes": (0.0,)}))
    for name in ("questions", "reply", "repeats", "rate", "mels"):
        with refuses("`: must be at least 1"):
            sound.measure(Options(**{**FEW, name: (0,) if name == "questions" else 0}))
