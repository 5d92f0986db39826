"""Sound to rows: decoded in parts, resampled to one rate and channel, cut into frames of log-mel energies.

    frame_t = (log10(M |FFT(window * x[t hop : t hop + window])|^2 + 1e-8) + 4) / 2        M: bands evenly spaced in mel

A row is `stack` frames. Rows never depend on later sound, so an hour of sound needs the memory of a few seconds.
(mel = 2595 log10(1 + f / 700): O'Shaughnessy, Speech Communication, 1987.)
"""

import io
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from retentive.data.archives import Row
from retentive.files import check_file
from retentive.models.encoders import RATES, AudioConfig

FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG")
MOST_CHANNELS = 8
"""Maximum channels of a file: 255 channels of silence are a small file, and a gigabyte when decoded."""
MOST_SECONDS = 4 * 3600
"""Maximum length of a file in seconds."""
BLOCK = 10
"""Seconds decoded at once."""


class Samples:
    """A sound that is decoded already, with the few members of `soundfile.SoundFile` that are used here.

    Args:
        values: int16 or float32 `[samples]`.
        samplerate: sampling rate in Hz.
    """

    channels = 1

    def __init__(self, values: np.ndarray, samplerate: int):
        self.values, self.samplerate, self.frames, self.at = values, samplerate, len(values), 0

    def read(self, frames: int, dtype: str = "float32", always_2d: bool = True) -> np.ndarray:
        """Returns the next samples, float32 `[frames, 1]`, as a WAV of the same samples would be read."""
        block = self.values[self.at : self.at + frames].astype(dtype)
        self.at += frames
        return (block / np.float32(1 << 15) if self.values.dtype == np.int16 else block)[:, None]

    def __enter__(self) -> "Samples":
        return self

    def __exit__(self, *error: object) -> None:
        pass


def open_audio(
    source: Path | bytes | Row, config: AudioConfig, *, most_seconds: float = MOST_SECONDS, name: str = ""
) -> np.ndarray:
    """Returns the rows of a sound, float16 `[n, config.features]`.

    Raises:
        OSError, ValueError, ImportError: as `stream_audio`.
    """
    return np.concatenate(list(stream_audio(source, config, most_seconds=most_seconds, name=name)))


def stream_audio(
    source: Path | bytes | Row, config: AudioConfig, *, most_seconds: float = MOST_SECONDS, name: str = ""
) -> Iterator[np.ndarray]:
    """Yields the rows of a sound in parts; together they equal those of `open_audio`.

    Args:
        source: a file, its bytes, or samples: int16 or float32 `[samples]` with their rate.
        name: name in errors; by default that of the file.

    Raises:
        OSError: the file does not exist.
        ValueError: it has another format, is empty or too long, has an unsupported sample rate, or is damaged; samples
            have another shape or dtype, or no rate.
        ImportError: soundfile or soxr is missing (extra `multimodal`).
    """
    try:
        import soundfile
        import soxr
    except ImportError as error:
        raise ImportError(f"sound needs {error.name}: pip install 'retentive[multimodal]'") from None
    name = name or (str(source) if isinstance(source, Path) else "the sound")
    if isinstance(source, Path):
        check_file(source)
    try:
        file = (
            _samples(source, name)
            if isinstance(source, Row)
            else soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else str(source))
        )
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{name} is no sound of WAV, FLAC or OGG, or is damaged ({error.error_string})") from None
    with file:
        if not isinstance(source, Row):
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


def _samples(row: Row, name: str) -> Samples:
    """Returns the sound in a row of an array; raises ValueError for another shape or dtype, or if it has no rate."""
    values, rate = row
    if values.dtype not in (np.int16, np.float32) or values.ndim != 1:
        got = f"{values.dtype} {list(values.shape)}"
        raise ValueError(f"{name} is {got}, expected int16 or float32 [samples]; convert the array")
    if rate is None:
        raise ValueError(f"{name} has no sampling rate; write its samples a second behind it, as {name}@16000")
    return Samples(values, rate)


def _check_wav(source: Path | bytes, name: str) -> None:
    """Raises ValueError for a WAV that is shorter than its header says."""
    with _opened(source) as file:
        head, size = file.read(28), file.seek(0, io.SEEK_END)
    large = head[:4] == b"RF64"  # for files above 4 GB (EBU Tech 3306)
    said = int.from_bytes(head[20:28] if large else head[4:8], "little")
    unknown = not large and said & 0x7FFFF000 == 0x7FFFF000  # writers to a pipe give the maximum, signed or not
    if size < said + 8 and not unknown:
        raise ValueError(f"{name} is cut short: it has {size:,} of {said + 8:,} bytes")


def _check_ogg(source: Path | bytes, name: str) -> None:
    """Raises ValueError for an OGG with a truncated, missing or changed page (RFC 3533, section 6)."""
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
    """Returns OGG's CRC-32: zlib's with bits in reverse order, and without its initial and final inversion."""
    crc = zlib.crc32(page.translate(OTHER_ORDER), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{crc:032b}"[::-1], 2).to_bytes(4, "little")


OTHER_ORDER = bytes(int(f"{n:08b}"[::-1], 2) for n in range(256))
"""Each byte with its bits reversed."""


def _opened(source: Path | bytes) -> BinaryIO:
    return io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")


CHECKS = {"WAV": _check_wav, "WAVEX": _check_wav, "RF64": _check_wav, "OGG": _check_ogg}
"""Checks for formats that libsndfile reads up to a cut without an error, so that half a copy would pass as all."""


class Frames:
    """Converts samples to rows incrementally; the rows do not depend on how the sound is split."""

    def __init__(self, config: AudioConfig):
        self.config = config
        self.window, self.hop = (config.rate * ms // 1000 for ms in (config.window, config.hop))
        self.samples = np.empty(0, np.float32)  # from the start of the next frame on
        self.waiting = np.empty((0, config.mels), np.float32)  # frames of an unfinished row

    def push(self, samples: np.ndarray, *, last: bool = False) -> Iterator[np.ndarray]:
        """Yields the rows completed by these samples; after the last, silence pads the last frame and row."""
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
        """Returns log-mel energies `[n, mels]` of frames of samples `[n, window]`."""
        shape, bands = filters(self.config.rate, self.window, self.config.mels)
        energy = np.abs(np.fft.rfft(cut * shape)) ** 2 @ bands
        return ((np.log10(energy + 1e-8) + 4) / 2).astype(np.float32)


@lru_cache
def filters(rate: int, window: int, mels: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (Hann window scaled so that a full tone has energy 1, triangular filters `[window // 2 + 1, mels]`)."""
    shape = np.hanning(window + 2)[1:-1]
    top = 2595 * np.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, mels + 2) / 2595) - 1)
    at = np.fft.rfftfreq(window, 1 / rate)[:, None]
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    # at least as wide as the window's resolution: a band between two of its frequencies would be empty
    least = rate / window
    rise, fall = np.maximum(centre - low, least), np.maximum(high - centre, least)
    bands = np.clip(np.minimum((at - centre) / rise + 1, (centre - at) / fall + 1), 0, None)
    return shape * 2 / shape.sum(), bands
