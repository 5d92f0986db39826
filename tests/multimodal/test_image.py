"""Pictures: exact pixels in patches; fitted into the square upright and on white; refusals and when they happen."""

import io
import struct
import zlib

import numpy as np
import pytest

pytest.importorskip("PIL", reason="pictures need pip install 'retentive[multimodal]'")

from PIL import Image

from retentive.models.encoders import ImageConfig
from retentive.multimodal import image as module
from retentive.multimodal import open_image

GREY, COLOUR = (ImageConfig(token=0, size=8, patch=4, channels=n) for n in (1, 3))


def encoded(picture, form="PNG", **how) -> bytes:
    out = io.BytesIO()
    picture.save(out, form, **how)
    return out.getvalue()


def whole(rows, config):
    """Reassembles the picture from its rows, `[H,W,C]`."""
    n, p, C = config.size // config.patch, config.patch, config.channels
    return rows.reshape(n, n, p, p, C).transpose(0, 2, 1, 3, 4).reshape(n * p, n * p, C)


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_pixels_are_as_they_are_in_patches(form):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    rows = open_image(encoded(Image.fromarray(pixels), form, **({"lossless": True} if form == "WEBP" else {})), COLOUR)
    assert rows.dtype == np.uint8 and rows.shape == (4, 48)
    assert np.array_equal(whole(rows, COLOUR), pixels)
    # the second row is the patch to the right of the first, its pixels line by line
    assert np.array_equal(rows[1], pixels[:4, 4:].reshape(-1))


def test_it_is_brought_to_the_square_on_white(tmp_path):
    path = tmp_path / "wide.jpg"
    path.write_bytes(encoded(Image.new("RGB", (40, 20), "black"), "JPEG"))
    seen = whole(open_image(path, GREY), GREY)[..., 0]
    assert (seen[:2] == 255).all() and (seen[-2:] == 255).all() and (seen[3:5] < 40).all()
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    clear.paste((255, 0, 0, 255), (0, 0, 4, 4))
    seen = whole(open_image(encoded(clear), COLOUR), COLOUR)
    assert (seen[:4, :4] == (255, 0, 0)).all() and (seen[4:] == 255).all()
    glass = Image.new("RGBA", (24, 12), (0, 0, 0, 51))  # scaled before it is put on white, with the same result
    assert (whole(open_image(encoded(glass), GREY), GREY)[2:6] == 204).all()


def test_it_is_turned_as_its_camera_says():
    picture = Image.new("L", (8, 8), "white")
    picture.paste(0, (0, 0, 8, 2))  # black at the top
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    seen = whole(open_image(encoded(picture, "JPEG", exif=exif, quality=100), GREY), GREY)[..., 0]
    assert (seen[-2:] < 60).all() and (seen[:2] > 200).all()


def test_a_cameras_preview_is_not_looked_at():
    picture, preview = Image.new("L", (8, 8), 40), Image.new("L", (4, 4), 200)
    raw = encoded(picture, "MPO", save_all=True, append_images=[preview])  # a JPEG followed by another one
    assert np.abs(open_image(raw, GREY).astype(int) - 40).max() < 5


def test_a_thin_picture_is_a_line():
    seen = whole(open_image(encoded(Image.new("L", (2000, 10), "black")), GREY), GREY)[..., 0]
    assert sorted(seen.sum(1)) == [0] + [8 * 255] * 7


def bomb() -> bytes:
    """Returns a PNG whose header claims 100,000 x 100,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + data + chunk(b"IEND", b"")


def changed(raw: bytes, at: int) -> bytes:
    """Returns the bytes with one of them changed."""
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


def test_what_is_refused(tmp_path, refuses, monkeypatch):
    picture = Image.new("L", (8, 8))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8))
    moving = encoded(picture, save_all=True, append_images=[Image.new("L", (8, 8), 9)])
    for raw, why in (
        (b"no picture at all", "the picture is no picture of PNG, JPEG, WEBP"),
        (encoded(picture, "BMP"), "is no picture of PNG, JPEG, WEBP"),
        (b"", "is no picture of"),
        (encoded(noise)[:20], "the picture: a PNG that is cut short after 20 bytes; give the whole file"),
        (encoded(noise)[:2000], "the picture: a PNG that is cut short after 2,000 bytes"),
        (changed(encoded(noise), 3000), "the picture is damaged"),
        (encoded(noise, "JPEG")[:900], "the picture: a JPEG that is cut short after 900 bytes"),
        (encoded(noise, "JPEG")[:3], "the picture: a JPEG that is cut short after 3 bytes"),
        (encoded(noise, "WEBP", lossless=True)[:900], "the picture: a WebP that is cut short after 900 bytes"),
        (changed(encoded(noise, "WEBP", lossless=True), 20), "the picture cannot be opened as a picture"),
        (moving, "moves, it has 2 frames: give one of them"),
        (encoded(Image.fromarray(np.zeros((8, 8), np.uint16))), "the picture has 16 bits a colour: save it with 8"),
        (bomb(), "the picture has more than 67,108,864 pixels: make it smaller"),
    ):
        with refuses(why):
            open_image(raw, GREY)
    monkeypatch.setattr(module, "MOST_PIXELS", 63)
    path = tmp_path / "large.png"
    path.write_bytes(encoded(picture))
    with refuses(f"{path} has more than 63 pixels: make it smaller, it has 8 x 8"):
        open_image(path, GREY)
    with refuses(f"no file at {tmp_path / 'none.png'}", FileNotFoundError):
        open_image(tmp_path / "none.png", GREY)
    colours = bytearray(encoded(Image.new("RGB", (8, 8))))
    colours[24] = 16  # like the header of a file with 16 bits each for red, green and blue
    with refuses("the picture has 16 bits a colour: save it with 8"):
        open_image(bytes(colours), COLOUR)
