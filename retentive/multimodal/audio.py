"""Sound to rows: decoded part by part, brought to one rate and channel, cut into frames of log-mel energies.

    frame_t = (log10(M |FFT(window * x[t hop : t hop + window])|^2 + 1e-8) + 4) / 2        M: bands evenly spaced in mel

A row is `stack` frames. What is heard before does not depend on what comes after, so that an hour of sound takes the
memory of a few seconds. (mel = 2595 log10(1 + f / 700): O'Shaughnessy, Speech Communication, 1987.)
"""

import io
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from retentive.files import check_file
from retentive.models.encoders import RATES, AudioConfig

FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG")
MOST_CHANNELS = 8
"""Of a file: silence of 255 of them is a small one, and a gigabyte when it is decoded."""
MOST_SECONDS = 4 * 3600
"""Of a file."""
BLOCK = 10
"""Seconds that are decoded at once."""


def open_audio(source: Path | bytes, config: AudioConfig, *, most_seconds: float = MOST_SECONDS) -> np.ndarray:
    """The rows of a sound, float16 `[n, config.features]`.

    Raises:
        OSError, ValueError, ImportError: as `stream_audio`.
    """
    return np.concatenate(list(stream_audio(source, config, most_seconds=most_seconds)))


def stream_audio(
    source: Path | bytes, config: AudioConfig, *, most_seconds: float = MOST_SECONDS
) -> Iterator[np.ndarray]:
    """The rows of a sound, a part of them at a time; they are those of `open_audio`.

    Raises:
        OSError: no such file.
        ValueError: no sound of these formats; one that is empty, too long, of an odd rate, or damaged.
        ImportError: no soundfile or soxr (extra `multimodal`).
    """
    try:
        import soundfile
        import soxr
    except ImportError as error:
        raise ImportError(f"sound needs {error.name}: pip install 'retentive[multimodal]'") from None
    name = "the sound" if isinstance(source, bytes) else str(source)
    if isinstance(source, Path):
        check_file(source)
    try:
        file = soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else str(source))
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{name} is no sound of WAV, FLAC or OGG, or is damaged ({error.error_string})") from None
    with file:
        if file.format not in FORMATS:
            raise ValueError(f"{name} is {file.format}, expected WAV, FLAC or OGG")
        if file.format in CHECKS:
            CHECKS[file.format](source, name)
        if file.samplerate not in RATES:
            raise ValueError(f"{name} has {file.samplerate:,} samples a second, expected {RATES[0]:,} to {RATES[-1]:,}")
        if file.channels > MOST_CHANNELS:
            raise ValueError(f"{name} has {file.channels} channels, more than {MOST_CHANNELS}: mix them")
        if not file.frames:
            raise ValueError(f"{name} is empty: it has no samples")
        if (seconds := file.frames / file.samplerate) > most_seconds:
            raise ValueError(f"{name} has {seconds:,.0f} seconds, more than {most_seconds:,.0f}: cut it")
        resampler = soxr.ResampleStream(file.samplerate, config.rate, 1, dtype="float32")
        frames, heard = Frames(config), 0
        try:
            while heard < file.frames:
                wanted = min(BLOCK * file.samplerate, file.frames - heard)
                block = file.read(wanted, dtype="float32", always_2d=True)
                if len(block) < wanted:
                    at = heard / file.samplerate
                    raise ValueError(f"{name} ends within {BLOCK} s after {at:.1f} s, its head says {seconds:.1f}")
                heard += len(block)
                mono = block.mean(1, dtype=np.float32)
                if not np.isfinite(mono).all():
                    raise ValueError(f"{name} holds samples that are no numbers, or too large ones")
                last = heard == file.frames
                yield from frames.push(resampler.resample_chunk(mono, last=last), last=last)
        except soundfile.LibsndfileError as error:
            at = heard / file.samplerate
            raise ValueError(f"{name} is damaged within {BLOCK} s after {at:.1f} s ({error.error_string})") from None


def _check_wav(source: Path | bytes, name: str) -> None:
    """Raises ValueError for a WAV that is shorter than its head says."""
    with _opened(source) as file:
        head, size = file.read(28), file.seek(0, io.SEEK_END)
    large = head[:4] == b"RF64"  # beyond 4 GB (EBU Tech 3306)
    said = int.from_bytes(head[20:28] if large else head[4:8], "little")
    unknown = not large and said & 0x7FFFF000 == 0x7FFFF000  # who writes to a pipe says the most, signed or not
    if size < said + 8 and not unknown:
        raise ValueError(f"{name} is cut short: it has {size:,} of {said + 8:,} bytes")


def _check_ogg(source: Path | bytes, name: str) -> None:
    """Raises ValueError for an OGG with a page that is cut, missing or changed (RFC 3533, section 6)."""
    with _opened(source) as file:
        size, begin, following = file.seek(0, io.SEEK_END), 0, dict[bytes, int]()
        while begin < size:
            file.seek(begin)
            head = file.read(27)  # "OggS", version, flags, position[8], stream[4], number[4], checksum[4], segments
            segments = file.read(head[26]) if len(head) == 27 else b""
            stream, number = head[14:18], int.from_bytes(head[18:22], "little")
            if head[:4] != b"OggS" or number != following.get(stream, number):
                raise ValueError(f"{name} is damaged: no page of it is at byte {begin:,} of {size:,}")
            body, end = file.read(sum(segments)), begin + 27 + len(segments) + sum(segments)
            if end > size:
                raise ValueError(f"{name} is cut short: its last page ends at byte {end:,} of {size:,}")
            if _checksum(head[:22] + bytes(4) + head[26:] + segments + body) != head[22:26]:
                raise ValueError(f"{name} is damaged: its page at byte {begin:,} of {size:,} is not as it was written")
            following[stream], begin = number + 1, end


def _checksum(page: bytes) -> bytes:
    """CRC-32 as OGG has it: zlib's, of bits in the other order, and without the ones that it begins and ends with."""
    crc = zlib.crc32(page.translate(OTHER_ORDER), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{crc:032b}"[::-1], 2).to_bytes(4, "little")


OTHER_ORDER = bytes(int(f"{n:08b}"[::-1], 2) for n in range(256))
"""Each byte with its bits reversed."""


def _opened(source: Path | bytes) -> BinaryIO:
    return io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")


CHECKS = {"WAV": _check_wav, "WAVEX": _check_wav, "RF64": _check_wav, "OGG": _check_ogg}
"""Of formats that libsndfile reads as far as they go: half a copy would be heard as if it were all."""


class Frames:
    """Samples in parts to rows in parts, the same rows however the sound is cut."""

    def __init__(self, config: AudioConfig):
        self.config = config
        self.window, self.hop = (config.rate * ms // 1000 for ms in (config.window, config.hop))
        self.samples = np.empty(0, np.float32)  # from the beginning of the next frame on
        self.waiting = np.empty((0, config.mels), np.float32)  # frames of a row that is not full

    def push(self, samples: np.ndarray, *, last: bool = False) -> Iterator[np.ndarray]:
        """The rows that are complete with these samples; at the last, silence fills the last frame and row."""
        self.samples = np.concatenate([self.samples, samples])
        if last:
            left = max(len(self.samples) - self.window, 0)
            self.samples = np.pad(self.samples, (0, self.window + -(-left // self.hop) * self.hop - len(self.samples)))
        count = (len(self.samples) - self.window) // self.hop + 1 if len(self.samples) >= self.window else 0
        if count:
            cut = np.lib.stride_tricks.sliding_window_view(self.samples, self.window)[:: self.hop][:count]
            self.waiting = np.concatenate([self.waiting, self.mels(cut)])
            self.samples = self.samples[count * self.hop :]
        stack = self.config.stack
        if last and (odd := -len(self.waiting) % stack):
            silence = self.mels(np.zeros((1, self.window), np.float32))
            self.waiting = np.concatenate([self.waiting, silence.repeat(odd, 0)])
        if whole := len(self.waiting) // stack * stack:
            rows, self.waiting = self.waiting[:whole], self.waiting[whole:]
            yield rows.reshape(-1, self.config.features).astype(np.float16)

    def mels(self, cut: np.ndarray) -> np.ndarray:
        """Log-mel energies `[n, mels]` of frames of samples `[n, window]`."""
        shape, bands = filters(self.config.rate, self.window, self.config.mels)
        energy = np.abs(np.fft.rfft(cut * shape)) ** 2 @ bands
        return ((np.log10(energy + 1e-8) + 4) / 2).astype(np.float32)


@lru_cache
def filters(rate: int, window: int, mels: int) -> tuple[np.ndarray, np.ndarray]:
    """(Hann's window, with which a full tone has an energy of about 1; triangles `[window // 2 + 1, mels]`)."""
    shape = np.hanning(window + 2)[1:-1]
    top = 2595 * np.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, mels + 2) / 2595) - 1)
    at = np.fft.rfftfreq(window, 1 / rate)[:, None]
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    # no narrower than what the window resolves: a band between two of its frequencies would be empty
    least = rate / window
    rise, fall = np.maximum(centre - low, least), np.maximum(high - centre, least)
    bands = np.clip(np.minimum((at - centre) / rise + 1, (centre - at) / fall + 1), 0, None)
    return shape * 2 / shape.sum(), bands
