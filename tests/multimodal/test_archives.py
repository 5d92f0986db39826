"""Archives and arrays in place of single files: the same packed bytes and answers; refusals name their line."""

import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="pictures need pip install 'retentive[multimodal]'")
pytest.importorskip("soundfile", reason="sound needs pip install 'retentive[multimodal]'")
pytest.importorskip("soxr", reason="sound needs pip install 'retentive[multimodal]'")
pytest.importorskip("jinja2", reason="chat templates need pip install 'retentive[serve]'")

import soundfile
from PIL import Image

from retentive.checkpoint import save_model
from retentive.cli import main
from retentive.data.archives import Row
from retentive.data.templates import TURNS
from retentive.data.tokenizer import ByteTokenizer
from retentive.models import build, retnet
from retentive.models.encoders import AudioConfig, ImageConfig, with_encoders
from retentive.multimodal import Opener, open_audio, open_image, prepare
from retentive.multimodal import audio as audio_module
from retentive.multimodal import image as image_module

IMAGE = {"size": 8, "patch": 4, "channels": 1}
AUDIO = {"rate": 8000, "mels": 8, "stack": 2}
COUNT = 12


def png(pixels) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def wav(samples, rate: int, subtype: str) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format="WAV", subtype=subtype)
    return out.getvalue()


def put(files: dict[str, bytes]) -> None:
    """Writes the files into files/, files.zip and files.tar of the working folder."""
    with zipfile.ZipFile("files.zip", "w") as zipped, tarfile.open("files.tar", "w") as tarred:
        for name, raw in files.items():
            with open(f"files/{name}", "wb") as file:
                file.write(raw)
            zipped.writestr(name, raw)
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            tarred.addfile(member, io.BytesIO(raw))


def asked(name: str, image: str = "", audio: str = "") -> None:
    """Writes NAME.jsonl: a conversation for each n about the picture or sound of that name, or both."""
    with open(f"{name}.jsonl", "w") as file:
        for n in range(COUNT):
            parts = [
                {"type": kind, kind: form.format(n)} for kind, form in (("image", image), ("audio", audio)) if form
            ]
            turns = [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]
            turns += [{"role": "assistant", "content": f"It is {n}."}]
            file.write(json.dumps({"messages": turns}) + "\n")


def packed(name: str, **how) -> dict[str, bytes]:
    """Returns the content of each file of the packed folder."""
    options = {"image": IMAGE, "audio": AUDIO, "tokenizer": "bytes", "valid_fraction": 0.2, "overwrite": True, **how}
    prepare(f"{name}.jsonl", "data", **options)
    return {file.name: file.read_bytes() for file in Path("data").iterdir()}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "files").mkdir()
    return tmp_path


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3), (5, 9), (20, 30, 3)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_pack_to_the_same_bytes(place, shape, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, *shape), np.uint8)
    put({f"{n}.png": png(each) for n, each in enumerate(pixels)})
    np.save("files.npy", pixels)
    how = {"image": {**IMAGE, "channels": channels}, "audio": None}
    found = {}
    for name in ("files/{}.png", "files.zip/{}.png", "files.tar/{}.png", "files.npy[{}]"):
        asked("one", image=name)
        found[name] = packed("one", **how)
    want = found["files/{}.png"]
    assert len(want["train-00000.image"]) + len(want["valid-00000.image"]) == COUNT * 64 * channels
    assert all(each == want for each in found.values())
    np.save("files.npy", pixels[::-1])  # the pixels matter
    asked("one", image="files.npy[{}]")
    assert packed("one", **how)["train-00000.image"] != want["train-00000.image"]


@pytest.mark.parametrize(("dtype", "subtype"), [(np.int16, "PCM_16"), (np.float32, "FLOAT")])
@pytest.mark.parametrize("rate", [8000, 11_025])
def test_sounds_pack_to_the_same_bytes(place, dtype, subtype, rate, monkeypatch):
    monkeypatch.setattr(audio_module, "BLOCK", 1)  # decode in several parts
    random = np.random.default_rng(0)
    samples = random.standard_normal((COUNT, 3 * rate // 2)) / 5
    samples = (samples * (1 << 15)).clip(-(1 << 15), (1 << 15) - 1).astype(dtype) if dtype is np.int16 else samples
    np.save("files.npy", samples.astype(dtype))
    put({f"{n}.wav": wav(each, rate, subtype) for n, each in enumerate(np.load("files.npy"))})
    found = {}
    for name in ("files/{}.wav", "files.zip/{}.wav", "files.tar/{}.wav", f"files.npy[{{}}]@{rate}"):
        asked("one", audio=name)
        found[name] = packed("one")
    assert all(each == found["files/{}.wav"] for each in found.values())
    assert len(set(found["files/{}.wav"]["train-00000.audio"])) > 99


def test_archives_lie_beside_their_own_file(place):
    """A name is relative to the folder of its .jsonl, as that of a file is."""
    for n, folder in enumerate(("a", "b")):
        (place / folder).mkdir()
        with zipfile.ZipFile(place / folder / "pics.zip", "w") as archive:
            archive.writestr("deep/x.png", png(np.full((8, 8), 100 * n, np.uint8)))
        part = {"type": "image", "image": "pics.zip/deep/x.png"}
        turns = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "x"}]
        (place / folder / "c.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    prepare(".", "data", image=IMAGE, tokenizer="bytes", valid_fraction=0.0)
    assert (place / "data/train-00000.image").read_bytes() == bytes(64) + bytes([100]) * 64


def test_refusals_name_file_and_line(place, refuses, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8), np.uint8)
    put({f"{n}.png": png(each) for n, each in enumerate(pixels)} | {"7.png": b"no picture"})
    tarfile.open("files.tar.gz", "w:gz").close()
    np.save("files.npy", pixels[:7])
    np.save("light.npy", pixels / 255)
    np.save("wide.npy", pixels[:, None])
    np.save("none.npy", pixels[:, :0])
    np.save("clips.npy", np.zeros((COUNT, 800), np.float32))
    np.save("loud.npy", np.full((COUNT, 800), np.nan, np.float32))
    np.save("exact.npy", np.zeros((COUNT, 800)))
    Path("broken.zip").write_bytes(b"no zip")
    got = "expected uint8 [H, W] or [H, W, 3], 0 to 255; convert the array"
    heard = "expected int16 or float32 [samples]; convert the array"
    for kind, name, line, why in (
        ("image", "files.zip/{}.png", 8, "files.zip/7.png is no picture of PNG, JPEG, WEBP"),
        ("image", "files.tar/{}.png", 8, "files.tar/7.png is no picture of PNG, JPEG, WEBP"),
        ("image", "files.npy[{}]", 8, "files.npy[7]: the array has 7 rows; name one from 0 to 6"),
        ("image", "files.zip/0{}.png", 1, "files.zip/00.png: not in the archive, which has 12 members, as '0.png'"),
        ("image", "files.zip/../files/0.png", 1, "files.zip/../files/0.png: '..' leads out of the archive"),
        ("image", "files.tar.gz/{}.png", 1, "files.tar.gz: compressed as a whole, so members cannot be found; use"),
        (
            "image",
            "broken.zip/{}.png",
            1,
            "broken.zip: no zip, or damaged (File is not a zip file); zip the files again",
        ),
        ("image", "gone.zip/{}.png", 1, "no file at gone.zip/0.png"),
        ("image", "light.npy[{}]", 1, f"light.npy[0] is float64 [8, 8], {got}"),
        ("image", "wide.npy[{}]", 1, f"wide.npy[0] is uint8 [1, 8, 8], {got}"),
        ("image", "none.npy[{}]", 1, "none.npy[0] has no pixels: 0 x 8"),
        ("image", "files.npy[{}]@8000", 1, "files.npy[0]@8000: a picture has no sampling rate; leave out @8000"),
        ("audio", "clips.npy[{}]", 1, "clips.npy[0] has no sampling rate; write its samples a second behind it, as"),
        ("audio", "clips.npy[{}]@9", 1, "clips.npy[0]@9 has 9 samples a second, expected 1,000 to 399,999"),
        ("audio", "files.npy[{}]@8000", 1, f"files.npy[0]@8000 is uint8 [8, 8], {heard}"),
        ("audio", "exact.npy[{}]@8000", 1, f"exact.npy[0]@8000 is float64 [800], {heard}"),
        ("audio", "loud.npy[{}]@8000", 1, "loud.npy[0]@8000 holds samples that are no numbers, or too large ones"),
        ("audio", "files.zip/{}.png", 1, "files.zip/0.png is no sound of WAV, FLAC or OGG, or is damaged"),
    ):
        asked("one", **{kind: name})
        with refuses(f"one.jsonl:{line} cannot be taken: {why}"):
            packed("one")
        assert not Path("data").exists()
    monkeypatch.setattr(image_module, "MOST_PIXELS", 63)
    asked("one", image="files.npy[{}]")
    with refuses("one.jsonl:1 cannot be taken: files.npy[0] has more than 63 pixels: make it smaller, it has 8 x 8"):
        packed("one")
    monkeypatch.setattr(sys.modules[Opener.__module__], "MOST_BYTES", 20)
    asked("one", image="files.zip/{}.png")
    with refuses("one.jsonl:1 cannot be taken: files.zip/0.png: has "):
        packed("one")


def test_bad_members_are_skipped_on_request(place):
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8), np.uint8)
    put({f"{n}.png": png(each) for n, each in enumerate(pixels) if n % 2} | {"7.png": b"no picture"})
    np.save("files.npy", pixels[:7])
    said = []
    for name, kept, first in (
        ("files.zip/{}.png", 5, "one.jsonl:1: files.zip/0.png: not in the archive"),
        ("files.npy[{}]", 7, "one.jsonl:8: files.npy[7]: the array has 7 rows"),
    ):
        asked("one", image=name)
        meta = prepare("one.jsonl", "data", image=IMAGE, tokenizer="bytes", valid_fraction=0.0, on_bad_text="skip",
                       overwrite=True, say=said.append)  # fmt: skip
        assert meta.splits["train"].documents == kept
        assert said[-1].startswith(f"one.jsonl: skipped {COUNT - kept} conversations, the first is {first}")


def test_rows_are_opened_like_files(refuses):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    config = ImageConfig(token=0, **IMAGE)
    assert np.array_equal(open_image(pixels, config), open_image(png(pixels), config))
    with refuses("the picture is float64 [6, 9, 3], expected uint8"):
        open_image(pixels / 255, config)
    samples = np.random.default_rng(0).integers(-999, 999, 4000).astype(np.int16)
    config = AudioConfig(token=0, **AUDIO)
    assert np.array_equal(open_audio(Row(samples, 11_025), config), open_audio(wav(samples, 11_025, "PCM_16"), config))
    with refuses("the sound has 1 seconds, more than 0: cut it"):
        open_audio(Row(np.zeros(8000, np.int16), 8000), config, most_seconds=0.5)
    with refuses("the sound is empty: it has no samples"):
        open_audio(Row(samples[:0], 8000), config)


def test_a_question_on_the_command_line(place, capsys):
    model = build(retnet(vocab_size=257, dim=32, layers=1, heads=1))
    with_encoders(model, {"image": ImageConfig(token=257, **IMAGE), "audio": AudioConfig(token=258, **AUDIO)})
    save_model("run", model, ByteTokenizer(), template=TURNS)
    put({"0.png": png(np.zeros((8, 8), np.uint8)), "0.wav": wav(np.zeros(800, np.int16), 8000, "PCM_16")})
    np.save("pics.npy", np.zeros((2, 8, 8), np.uint8))
    np.save("clips.npy", np.zeros((2, 800), np.int16))
    said = []
    for image, audio in (
        ("files/0.png", "files/0.wav"),
        ("files.zip/0.png", "files.tar/0.wav"),
        ("pics.npy[1]", "clips.npy[1]@8000"),
    ):
        main(["generate", "run", "--image", image, "--audio", audio, "--prompt", "What?", "--max-tokens", "9",
              "--temperature", "0"])  # fmt: skip
        said.append(capsys.readouterr().out)
    assert said[0] and said == said[:1] * 3
    opener = Opener.of(model)
    assert opener("image", "pics.npy[0]", folder=place).name == "pics.npy[0]"
