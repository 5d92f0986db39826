r"""Transcription of spoken digits in a row, from single recordings; one speaker and other recordings are held out.

    python examples/voices.py voices zero one two three four five six seven eight nine
    python recipes/listen.py RECORDINGS digits george voices         (the Free Spoken Digit Dataset's recordings)
    retentive data digits/train.jsonl --valid digits/known.jsonl --chats --vocab-size 320 \
        --audio rate=8000 mels=20 --out data/digits
    retentive train --recipe recipes/listen.py            (the twin: --model transformer --out runs/listen-twin)
    retentive eval runs/listen --tasks transcription:known,transcription:george,transcription:turns50 --data digits \
        --max-tokens 120                                  (and transcription:turns5, :row5, :row50)
    retentive generate runs/listen --audio digits/row5.zip/0-0.wav --prompt "Which digits?"

Training data: single digits (two fifths of the sounds, since rows alone are learnt late), two to five digits in turns
with an answer each, and two to five digits in one sound with one answer. Recordings are varied: speed and pitch (like
another speaker), room echoes, trimmed ends, a random equaliser (like another microphone), volume, noise and pauses.
Recordings are DIGIT_SPEAKER_NUMBER.wav; with a folder of synthetic voices half of the training sounds use them.

Tests: unchanged single recordings of known speakers (known) and of the held-out one; the last of five and fifty digits
in turns (turns5, turns50); all of five and fifty digits in one sound (row5, row50).
"""

import io
import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import soundfile
import soxr

from retentive.train import TrainConfig, TrainRun

RATE = 8000
Talk = list[tuple[np.ndarray, str]]
"""Sounds with their digits."""
TRAINED, ROWS = 60_000, 400
"""Number of training sounds, and of tests for each number of digits in a row."""


def recipe() -> TrainRun:
    return TrainRun(
        data=Path("data/digits"),
        out=Path("runs/listen"),
        size="1m",
        set={"dropout": 0.1},
        mode="whole",
        batch=16,
        length=512,
        train=TrainConfig(steps=1500, lr=4e-3, warmup=100, eval_every=250, save_every=250, sample_every=500),
    )


def prepare(recordings: Path, out: Path, held_out: str, synthetic: Path | None = None) -> None:
    """Writes the sounds, and conversations about them."""
    files = sorted(recordings.glob("?_*_*.wav"))
    speakers = sorted({path.stem.split("_")[1] for path in files})
    if held_out not in speakers:
        sys.exit(f"no recordings by {held_out!r} in {recordings}: expected one of {', '.join(speakers)}")
    draw = random.Random(0)
    known = [path for path in files if path.stem.split("_")[1] != held_out]
    draw.shuffle(known)
    tested, trained = known[: len(known) // 10], known[len(known) // 10 :]
    more = sorted(synthetic.glob("?_*_*.wav")) if synthetic else []
    if synthetic and not more:
        sys.exit(f"no recordings in {synthetic}: expected DIGIT_VOICE_NUMBER.wav")
    sounds = {path: soundfile.read(path, dtype="float32")[0] for path in files + more}

    def row(of: list[list[Path]], count: int) -> tuple[list[np.ndarray], str]:
        chosen = [draw.choice(draw.choice(of)) for _ in range(count)]
        return [sounds[path] for path in chosen], " ".join(path.stem[0] for path in chosen)

    def turns(of: list[list[Path]], count: int, **how: bool) -> Talk:
        parts, digits = row(of, count)
        return [(spoken([part], draw, **how), digit) for part, digit in zip(parts, digits.split(), strict=True)]

    def whole(of: list[list[Path]], count: int, **how: bool) -> Talk:
        parts, digits = row(of, count)
        return [(spoken(parts, draw, **how), digits)]

    def varied() -> Iterable[Talk]:
        for _ in range(TRAINED):
            way = draw.choices([whole, turns], [0.7, 0.3])[0]
            count = 1 if way is whole and draw.random() < 0.6 else draw.randint(2, 5)
            yield way([trained, more] if more else [trained], count, varied=True)

    write(out, "train", varied())
    write(out, "known", ([(sounds[path], path.stem[0])] for path in tested))
    write(out, held_out, ([(sounds[p], p.stem[0])] for p in files if p.stem.split("_")[1] == held_out))
    for count in (5, 50):
        write(out, f"row{count}", (whole([tested], count) for _ in range(ROWS)))
        write(out, f"turns{count}", (turns([tested], count) for _ in range(ROWS)))


def spoken(parts: list[np.ndarray], draw: random.Random, *, varied: bool = False) -> np.ndarray:
    """Concatenates recordings, each followed by a pause of up to 0.2 s; unchanged, or varied one by one."""
    sound = []
    for part in parts:
        if varied:
            part = soxr.resample(part, RATE * draw.uniform(0.75, 1.35), RATE)
            part = equalised(cut(echoed(part, draw), draw), draw)
            part = part / max(np.abs(part).max(), 1e-6) * 10 ** draw.uniform(-1.7, 0)
        sound += [part, np.zeros(int(draw.uniform(0, 0.2) * RATE), np.float32)]
    whole = np.concatenate(sound)
    if varied:
        noise = np.random.default_rng(draw.getrandbits(32)).standard_normal(len(whole))
        whole = whole + np.abs(whole).max() * 10 ** draw.uniform(-5, -2) * noise
    return np.clip(whole, -1, 1)


def echoed(sound: np.ndarray, draw: random.Random) -> np.ndarray:
    """Adds room echoes half of the time, which decay by 60 dB in 0.1 to 0.6 s."""
    if draw.random() < 0.5:
        return sound
    room = np.random.default_rng(draw.getrandbits(32)).standard_normal(RATE * 6 // 10)
    room *= np.exp(-np.log(1000) * np.arange(len(room)) / RATE / draw.uniform(0.1, 0.6))
    room *= 10 ** draw.uniform(-1, 0) / np.linalg.norm(room)  # all echoes together are at most as loud as the sound
    room[0] += 1
    size = len(sound) + len(room)
    return np.fft.irfft(np.fft.rfft(sound, size) * np.fft.rfft(room, size), size)[: len(sound) + RATE // 5]


def cut(sound: np.ndarray, draw: random.Random) -> np.ndarray:
    """Trims ends that are 12 to 50 dB below the maximum, like real recordings; some then lack the s of six."""
    loud = np.convolve(sound**2, np.ones(80) / 80, "same")
    heard = np.nonzero(loud >= 10 ** -draw.uniform(1.2, 5) * loud.max())[0]
    return sound[heard[0] : heard[-1] + 1]


def equalised(sound: np.ndarray, draw: random.Random) -> np.ndarray:
    """Simulates another microphone: eight bands louder or softer by about 6 dB."""
    spectrum = np.fft.rfft(sound)
    decibel = np.interp(np.linspace(0, 7, len(spectrum)), range(8), [draw.gauss(0, 6) for _ in range(8)])
    return np.fft.irfft(spectrum * 10 ** (decibel / 20), len(sound))


def write(out: Path, name: str, talks: Iterable[Talk]) -> None:
    """Writes out/NAME.jsonl, and its sounds into out/NAME.zip."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / f"{name}.jsonl", "w", encoding="utf-8") as file, ZipFile(out / f"{name}.zip", "w") as archive:
        for n, talk in enumerate(talks):
            messages = []
            for m, (sound, digits) in enumerate(talk):
                wav = io.BytesIO()
                soundfile.write(wav, sound, RATE, format="WAV")
                archive.writestr(f"{n}-{m}.wav", wav.getvalue())
                words = {"type": "text", "text": "Which digits?"}
                heard = [{"type": "audio", "audio": f"{name}.zip/{n}-{m}.wav"}, words]
                messages += [{"role": "user", "content": heard}, {"role": "assistant", "content": digits}]
            file.write(json.dumps({"messages": messages}) + "\n")


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    prepare(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], *map(Path, sys.argv[4:]))
