"""Pictures to rows: opened within limits, fitted into a square, cut into patches.

A row is a patch: its pixels line by line with their channels, 0 to 255. Patches are in reading order.
"""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from retentive.files import check_file
from retentive.models.encoders import ImageConfig

FORMATS = ("PNG", "JPEG", "WEBP")
PNG = b"\x89PNG\r\n\x1a\n"
MOST_PIXELS = 1 << 26
"""Maximum pixels of a picture, checked in its header before decoding: a small file may expand without limit."""


def open_image(source: Path | bytes | np.ndarray, config: ImageConfig, name: str = "") -> np.ndarray:
    """Returns the rows of a picture, uint8 `[config.tokens, config.features]`.

    The picture is rotated as its EXIF data say, put on white where transparent, scaled to fit the square, and centred
    in it on white.

    Args:
        source: a file, its bytes, or pixels: uint8 `[H, W]` or `[H, W, 3]`.
        name: name in errors; by default that of the file.

    Raises:
        OSError: the file does not exist.
        ValueError: it has another format, is animated, has 16 bits per channel or too many pixels, or is cut short or
            damaged; pixels have another shape or dtype.
        ImportError: pillow is missing (extra `multimodal`).
    """
    try:
        import PIL.Image
    except ImportError:
        raise ImportError("pictures need pillow: pip install 'retentive[multimodal]'") from None
    name = name or (str(source) if isinstance(source, Path) else "the picture")
    if isinstance(source, np.ndarray):
        _check_pixels(source, name)
        return patches(_fitted(PIL.Image.fromarray(np.ascontiguousarray(source)), config), config.patch)
    if isinstance(source, Path):
        check_file(source)
    raw = source if isinstance(source, bytes) else source.read_bytes()
    picture = _opened(raw, name)
    try:
        if picture.format == "PNG":
            PIL.Image.open(io.BytesIO(raw)).verify()  # checks its checksums, which `load` ignores
        picture.load()
        pixels = _fitted(picture, config)
    except Exception as error:
        _check_whole(raw, name)
        raise ValueError(f"{name} is damaged ({error})") from None
    return patches(pixels, config.patch)


def _opened(raw: bytes, name: str) -> Any:
    """Returns the picture (`PIL.Image.Image`) with its header read; raises ValueError for one that is refused."""
    from PIL import Image, UnidentifiedImageError

    # pillow silently reduces 16-bit colour to 8 bits
    if raw.startswith(PNG) and raw[24:25] == b"\x10":
        raise ValueError(f"{name} has 16 bits a colour: save it with 8")
    too_many = f"{name} has more than {MOST_PIXELS:,} pixels: make it smaller"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is smaller
            picture: Any = Image.open(io.BytesIO(raw), formats=FORMATS)  # reads only the header
    except Image.DecompressionBombError:
        raise ValueError(too_many) from None
    except UnidentifiedImageError:
        _check_whole(raw, name)
        raise ValueError(f"{name} is no picture of {', '.join(FORMATS)}") from None
    except Exception as error:  # decoders may raise anything for arbitrary bytes
        _check_whole(raw, name)
        raise ValueError(f"{name} cannot be opened as a picture ({error})") from None
    width, height = picture.size
    if width * height > MOST_PIXELS:
        raise ValueError(f"{too_many}, it has {width:,} x {height:,}")
    # a camera's JPEG may hold a preview or depth map as further frames (MPO); the first is the picture
    if picture.format != "MPO" and getattr(picture, "n_frames", 1) > 1:
        raise ValueError(f"{name} moves, it has {picture.n_frames} frames: give one of them")
    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"{name} has more than 8 bits a colour ({picture.mode}): save it with 8")
    return picture


def _fitted(picture: Any, config: ImageConfig) -> np.ndarray:
    """Returns the pixels of a picture fitted into the square, uint8 `[size, size, channels]`."""
    from PIL import Image, ImageOps

    ImageOps.exif_transpose(picture, in_place=True)
    clear = picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info
    mode, side = "RGBA" if clear else "L" if config.channels == 1 else "RGB", config.size
    if picture.mode != mode:  # avoids a copy: a large picture is a quarter of a gigabyte
        picture = picture.convert(mode)
    if picture.size != (side, side):
        fitted = [max(round(each / max(picture.size) * side), 1) for each in picture.size]
        picture = picture.resize(fitted, Image.Resampling.BICUBIC)
    square = Image.new("RGB" if clear else mode, (side, side), "white")
    place = round((side - picture.width) / 2), round((side - picture.height) / 2)
    square.paste(picture, place, picture if clear else None)
    picture = square.convert("L" if config.channels == 1 else "RGB")
    return np.asarray(picture, np.uint8).reshape(side, side, config.channels)


def _check_pixels(pixels: np.ndarray, name: str) -> None:
    """Raises ValueError for an array that is no picture."""
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3):
        got = f"{pixels.dtype} {list(pixels.shape)}"
        raise ValueError(f"{name} is {got}, expected uint8 [H, W] or [H, W, 3], 0 to 255; convert the array")
    height, width = pixels.shape[:2]
    if not height * width:
        raise ValueError(f"{name} has no pixels: {height} x {width}")
    if height * width > MOST_PIXELS:
        raise ValueError(f"{name} has more than {MOST_PIXELS:,} pixels: make it smaller, it has {width:,} x {height:,}")


def _check_whole(raw: bytes, name: str) -> None:
    """Raises ValueError for a file that could not be read since its end is missing."""
    if raw.startswith(PNG):
        kind, cut = "PNG", b"IEND" not in raw
    elif raw.startswith(b"\xff\xd8\xff"):
        kind, cut = "JPEG", raw.rfind(b"\xff\xd9") <= raw.rfind(b"\xff\xda")  # end of image, start of the last scan
    elif raw[:4] == b"RIFF" and raw[8:12] == b"WEBP":
        kind, cut = "WebP", len(raw) < 8 + int.from_bytes(raw[4:8], "little")
    else:
        return
    if cut:
        raise ValueError(f"{name}: a {kind} that is cut short after {len(raw):,} bytes; give the whole file")


def patches(pixels: np.ndarray, patch: int) -> np.ndarray:
    """Returns rows `[n, patch * patch * C]` of pixels `[H, W, C]`, whose sides are multiples of the patch's."""
    H, W, C = pixels.shape
    cut = pixels.reshape(H // patch, patch, W // patch, patch, C).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(cut).reshape(-1, patch * patch * C)
