"""examples/voices.py, beside programs that stand in for espeak-ng and flite: a tone between silences for each word."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

FILE = Path(__file__).parents[2] / "examples" / "voices.py"
SPEAKER = f"""#!{sys.executable}
import io, sys
import numpy as np, soundfile
if "--voices=variant" in sys.argv:
    print("Pty Language Age/Gender VoiceName File Other Languages")
    print(" 5  variant  --/F  Ann  !v/Ann              ")
    print(" 5  variant  --/M  Mr_B  !v/Mr b            ")
elif "-lv" in sys.argv:
    print("Voices available: kal awb ")
elif sys.argv[-1] != "two" or "awb" not in sys.argv:  # a voice that fails at a word
    tone = np.sin(np.arange(1600) * 0.3)
    file = io.BytesIO()
    soundfile.write(file, np.concatenate([np.zeros(4000), tone, np.zeros(4000)]), 16000, format="WAV")
    sys.stdout.buffer.write(file.getvalue())
"""


def said(folder: Path, *args: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PATH": str(folder)}
    return subprocess.run([sys.executable, FILE, *args], cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_each_word_in_each_voice(tmp_path):
    soundfile = pytest.importorskip("soundfile", reason="sound needs pip install 'retentive[multimodal]'")
    pytest.importorskip("soxr", reason="sound needs pip install 'retentive[multimodal]'")
    for name in ("espeak-ng", "flite"):
        (tmp_path / name).write_text(SPEAKER)
        (tmp_path / name).chmod(0o755)
    done = said(tmp_path, "voices", "one", "two")
    assert done.returncode == 0, done.stderr
    files = sorted((tmp_path / "voices").iterdir())
    # two variants in four accents, two voices at three speeds, one of which cannot say the second word
    assert len(files) == 2 * (2 * 4 + 2 * 3) - 3 and done.stdout == "voices: 25 recordings, 14 voices\n"
    names = [file.stem.split("_") for file in files]
    assert {n for n, _, _ in names} == {"0", "1"} and len({name for _, name, _ in names}) == 2 * 4 + 2
    for file in files:
        sound, rate = soundfile.read(file)
        assert rate == 8000 and 750 < len(sound) < 1000, "the tone of a tenth of a second, without the silence"
        assert np.abs(sound).max() > 0.9


def test_without_a_synthesiser(tmp_path):
    pytest.importorskip("soundfile", reason="sound needs pip install 'retentive[multimodal]'")
    pytest.importorskip("soxr", reason="sound needs pip install 'retentive[multimodal]'")
    done = said(tmp_path, "voices", "one")
    assert done.returncode == 1 and done.stderr.startswith("neither espeak-ng nor flite is installed")
    assert not (tmp_path / "voices").exists()
