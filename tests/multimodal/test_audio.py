"""Sound: tones in their bands at any sample rate, rows that do not depend on the cut; and refusals."""

import io

import numpy as np
import pytest

pytest.importorskip("soundfile", reason="sound needs pip install 'retentive[multimodal]'")
pytest.importorskip("soxr", reason="sound needs pip install 'retentive[multimodal]'")

import soundfile

from retentive.models.encoders import AudioConfig
from retentive.multimodal import audio as module
from retentive.multimodal import open_audio
from retentive.multimodal.audio import Frames, filters, stream_audio

CONFIG = AudioConfig(token=0, rate=8000, mels=24, stack=4)


def tone(hertz: float, rate: int, seconds: float = 1.0):
    return np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate).astype(np.float32)


def encoded(samples, rate: int, form: str = "WAV", **how) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=form, **how)
    return out.getvalue()


def mel(hertz: float) -> float:
    return 2595 * np.log10(1 + hertz / 700)


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG"])
@pytest.mark.parametrize("rate", [8000, 44_100, 11_025])
def test_a_tone_is_loudest_in_its_band(form, rate):
    for hertz in (300, 1000, 2500):
        rows = open_audio(encoded(tone(hertz, rate), rate, form), CONFIG)
        assert rows.dtype == np.float16 and rows.shape == (25, 96)  # one second: 98 frames, and silence in the last row
        frames = rows.reshape(-1, 24)[5:90].astype(np.float32)
        centres = np.linspace(0, mel(4000), 26)[1:-1]
        wanted = int(np.abs(centres - mel(hertz)).argmin())
        assert np.median(frames.argmax(1)) == wanted, hertz
        assert 1.8 < frames.max() < 2.2  # a full tone has energy 1: (log10(1) + 4) / 2


def test_both_channels_are_heard():
    left, right = tone(300, 8000), tone(2500, 8000)
    both = open_audio(encoded(np.stack((left, right), 1), 8000, subtype="FLOAT"), CONFIG)
    mean = open_audio(encoded((left + right) / 2, 8000, subtype="FLOAT"), CONFIG)
    assert np.array_equal(both, mean)


@pytest.mark.parametrize("samples", [1, 199, 200, 201, 280, 281, 5000, 8123])
def test_rows_do_not_depend_on_how_it_is_cut(samples):
    sound = np.random.default_rng(0).standard_normal(samples).astype(np.float32)
    whole = np.concatenate(list(Frames(CONFIG).push(sound, last=True)))
    frames = max(samples - 200, 0)  # at 8 kHz a window of 25 ms is 200 samples, a hop of 10 ms is 80
    assert len(whole) == -(-(1 + -(-frames // 80)) // 4)
    cuts = Frames(CONFIG)
    parts = [sound[a : a + 77] for a in range(0, samples, 77)]
    found = [rows for n, part in enumerate(parts) for rows in cuts.push(part, last=n == len(parts) - 1)]
    assert np.array_equal(np.concatenate(found), whole)


def test_a_long_sound_comes_in_parts(monkeypatch):
    sound = np.random.default_rng(0).standard_normal(3 * 8000).astype(np.float32) / 9
    raw = encoded(sound, 8000, subtype="FLOAT")
    whole = open_audio(raw, CONFIG)
    monkeypatch.setattr(module, "BLOCK", 1)
    parts = list(stream_audio(raw, CONFIG))
    assert len(parts) == 3 and np.array_equal(np.concatenate(parts), whole)


def test_no_band_is_empty():
    for config in (CONFIG, AudioConfig(token=0), AudioConfig(token=0, rate=8000, mels=80)):
        shape, bands = filters(config.rate, config.rate * config.window // 1000, config.mels)
        assert (bands.sum(0) > 0.5).all() and (bands >= 0).all() and shape.sum() == pytest.approx(2)


def cut_wav(said: int) -> bytes:
    raw = encoded(tone(300, 8000), 8000)
    return raw[:4] + said.to_bytes(4, "little") + raw[8:40] + said.to_bytes(4, "little") + raw[44:]


@pytest.mark.parametrize("said", [0x7FFFFFFF, 0x7FFFF024, 0xFFFFFFFF])
def test_who_writes_to_a_pipe_does_not_know_how_long_it_will_be(said):
    assert len(open_audio(cut_wav(said), CONFIG)) == 25


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_an_ogg_is_whole_or_refused(subtype, refuses):
    raw = encoded(
        np.random.default_rng(0).standard_normal(8 * 8000).astype(np.float32) / 9, 8000, "OGG", subtype=subtype
    )
    assert len(open_audio(raw, CONFIG)) == 200
    pages = [at for at in range(len(raw)) if raw[at : at + 4] == b"OggS"]
    assert len(pages) > 3
    for cut in (raw[: len(raw) // 2], raw[:-1]):
        with refuses(f"of {len(cut):,}"):
            open_audio(cut, CONFIG)
    with refuses("the sound is damaged: no page of it is at byte"):
        open_audio(raw[: pages[-2]] + raw[pages[-1] :], CONFIG)
    middle = (pages[-2] + pages[-1]) // 2
    with refuses(f"the sound is damaged: its page at byte {pages[-2]:,} of {len(raw):,} is not as it was written"):
        open_audio(raw[:middle] + bytes(20) + raw[middle + 20 :], CONFIG)


def test_what_is_refused(tmp_path, refuses, monkeypatch):
    sound = tone(300, 8000)
    for raw, why in (
        (b"no sound", "the sound is no sound of WAV, FLAC or OGG"),
        (encoded(sound, 8000, "AIFF"), "the sound is AIFF, expected WAV, FLAC or OGG"),
        (encoded(sound[:0], 8000), "the sound is empty: it has no samples"),
        (encoded(np.zeros((80, 9)), 8000), "the sound has 9 channels, more than 8: mix them"),
        (encoded(sound, 500), "the sound has 500 samples a second, expected 1,000 to 399,999"),
        (encoded(sound * np.nan, 8000, subtype="FLOAT"), "the sound holds samples that are no numbers"),
        (encoded(sound, 8000, "FLAC")[:3000], "damaged"),
        (encoded(sound, 8000)[:8022], "the sound is cut short: it has 8,022 of 16,044 bytes"),
        (encoded(sound, 8000, "RF64")[:8104], "the sound is cut short: it has 8,104 of 16,104 bytes"),
        (cut_wav(0x10000), "the sound is cut short: it has 16,044 of 65,544 bytes"),
    ):
        with refuses(why):
            open_audio(raw, CONFIG)
    with refuses("the sound has 1 seconds, more than 0: cut it"):
        open_audio(encoded(sound, 8000), CONFIG, most_seconds=0.5)
    with refuses(f"no file at {tmp_path / 'none.wav'}", FileNotFoundError):
        open_audio(tmp_path / "none.wav", CONFIG)


def test_what_comes_short_is_not_filled_up(monkeypatch, refuses):
    raw, read = encoded(tone(300, 8000, 25), 8000), soundfile.SoundFile.read

    def short(file, frames, **how):  # like a stream with a gap, which libsndfile skips
        return read(file, frames, **how)[: 8000 * 7]

    monkeypatch.setattr(soundfile.SoundFile, "read", short)
    with refuses("the sound ends within 10 s after 0.0 s, its head says 25.0"):
        open_audio(raw, CONFIG)
