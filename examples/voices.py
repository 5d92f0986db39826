r"""Words in some hundred synthetic voices, so that a model trained on few speakers understands new ones.

    apt install espeak-ng flite                (GPL-3.0 and BSD-like; one of them is enough)
    apt install mbrola mbrola-us1 mbrola-de4 … (people's diphones, in other countries' accents; not to be sold)
    python examples/voices.py voices zero one two three four five six seven eight nine
    python recipes/listen.py RECORDINGS digits george voices

Writes voices/N_VOICE_K.wav, where N is the number of the word: each of espeak-ng's variants in four of its English
accents with their own speed and pitch; each of flite's voices at three speeds; each of MBROLA's voices that speak
English, some with a German, Greek or Polish accent, twelve times.
"""

import io
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import soxr

RATE = 8000
ACCENTS = ("en-gb", "en-us", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029", "en-us-nyc")
EACH, SPEEDS, TIMES = 4, (0.8, 1.0, 1.2), 12
"""Accents per espeak-ng variant, speeds of flite's voices, and repetitions of MBROLA's voices."""
Voice = tuple[str, list[str]]
"""Name, and the command that prints a WAV when the word is appended."""


def prepare(out: Path, words: list[str]) -> None:
    """Writes each word in each installed voice."""
    voices = [*espeak(), *mbrola(), *flite()]
    if not voices:
        sys.exit("neither espeak-ng nor flite is installed: they are packages of Debian, Fedora, Homebrew")
    out.mkdir(parents=True, exist_ok=True)
    for name, command in voices:
        for n, word in enumerate(words):
            if len(sound := said(command, word)):
                soundfile.write(out / f"{n}_{name}.wav", sound, RATE)
    print(f"{out}: {len(list(out.glob('*.wav')))} recordings, {len(voices)} voices")


def espeak() -> Iterator[Voice]:
    """Yields some accents, speeds and pitches of each variant (a simulated larynx)."""
    if not (program := shutil.which("espeak-ng")):
        return
    draw = random.Random(0)
    rows = subprocess.run([program, "--voices=variant"], capture_output=True, text=True, check=True).stdout
    for row in rows.splitlines()[1:]:
        variant = row[row.index("!v/") + 3 :].split("  ")[0].strip()
        for accent in draw.sample(ACCENTS, EACH):
            speed, pitch = draw.randint(100, 190), draw.randint(15, 75)
            name = "".join(c for c in accent + variant if c.isalnum())
            yield f"{name}_0", [program, "-v", f"{accent}+{variant}", f"-s{speed}", f"-p{pitch}", "--stdout"]


def mbrola() -> Iterator[Voice]:
    """Yields each English voice, driven by espeak-ng, at several speeds and pitches; skips missing ones."""
    if not ((program := shutil.which("espeak-ng")) and shutil.which("mbrola")):
        return
    draw = random.Random(0)
    rows = subprocess.run([program, "--voices=mb"], capture_output=True, text=True, check=True).stdout
    for row in rows.splitlines()[1:]:
        _, language, _, _, file, *_ = row.split()
        voice = file.removeprefix("mb/")
        if not (language.startswith("en") and len(said([program, "-v", voice, "--stdout"], "one"))):
            continue
        for n in range(TIMES):
            speed, pitch = draw.randint(110, 200), draw.randint(20, 80)
            yield f"{voice.replace('-', '')}_{n}", [program, "-v", voice, f"-s{speed}", f"-p{pitch}", "--stdout"]


def flite() -> Iterator[Voice]:
    """Yields each voice slower, unchanged and faster."""
    if not (program := shutil.which("flite")):
        return
    told = subprocess.run([program, "-lv"], capture_output=True, text=True, check=True).stdout
    for voice in told.partition(":")[2].split():
        for n, speed in enumerate(SPEEDS):
            how = ["-voice", voice, "--setf", f"duration_stretch={1 / speed}", "-o", "/dev/stdout", "-t"]
            yield f"{voice}_{n}", [program, *how]


def said(command: list[str], word: str) -> np.ndarray:
    """Returns the word at RATE, without surrounding silence; empty if the voice fails."""
    done = subprocess.run([*command, word], capture_output=True)
    try:
        sound, rate = soundfile.read(io.BytesIO(done.stdout), dtype="float32")
    except soundfile.LibsndfileError:
        return np.zeros(0, np.float32)
    sound = soxr.resample(sound, rate, RATE)
    loud = np.convolve(sound**2, np.ones(80) / 80, "same")
    heard = np.nonzero(loud > 4e-4 * loud.max())[0]
    return sound[heard[0] : heard[-1] + 1] if len(heard) else sound


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    prepare(Path(sys.argv[1]), sys.argv[2:])
