"""Memories of pictures and sound give the same answers as the files, however they are read in parts."""

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="pictures need pip install 'retentive[multimodal]'")
pytest.importorskip("soundfile", reason="sound needs pip install 'retentive[multimodal]'")
pytest.importorskip("soxr", reason="sound needs pip install 'retentive[multimodal]'")
pytest.importorskip("jinja2", reason="chat templates need pip install 'retentive[serve]'")

import soundfile
from PIL import Image

from retentive.checkpoint import load, save_model
from retentive.cli import main
from retentive.data.templates import TURNS, load_template
from retentive.data.tokenizer import ByteTokenizer
from retentive.infer import SamplingParams
from retentive.infer.conversation import Conversation
from retentive.infer.engine import Engine
from retentive.infer.memory import load_memory, save
from retentive.models import build, retnet
from retentive.models.encoders import AudioConfig, ImageConfig, with_encoders
from retentive.multimodal import audio


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = build(retnet(vocab_size=257, dim=32, layers=2, heads=2))
    image = ImageConfig(token=257, size=8, patch=4, channels=1, dim=16, layers=1)
    with_encoders(model, {"image": image, "audio": AudioConfig(token=258, rate=8000, mels=8, stack=2, dim=16)})
    for p in model.parameters():  # far from uniform, so that the input changes the output
        torch.nn.init.normal_(p, std=2 * p.shape[-1] ** -0.5) if p.ndim == 2 else None
    save_model("run", model.double(), ByteTokenizer(), template=TURNS)  # float64, so that no choice depends on rounding
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (8, 8), np.uint8)).save("a.png")
    soundfile.write("b.wav", random.standard_normal(3 * 8000) / 9, 8000)
    (tmp_path / "c.txt").write_text("text")
    return tmp_path


ASK = ["--max-tokens", "12", "--temperature", "0", "--prompt", "What?"]


def test_the_answers_are_those_about_the_files(place, capsys, monkeypatch):
    main(["generate", "run", "--image", "a.png", "--audio", "b.wav", *ASK])
    want = capsys.readouterr().out
    monkeypatch.setattr(audio, "BLOCK", 1)  # decode one second at a time
    main(["memory", "write", "run", "a.png", "b.wav", "--out", "m.safetensors"])
    shown = capsys.readouterr().out
    assert "of 2 documents" in shown and "a.png: 4 tokens" in shown and "b.wav: 150 tokens" in shown
    for _ in range(2):  # may be asked repeatedly
        main(["memory", "ask", "run", "--memory", "m.safetensors", *ASK])
        assert capsys.readouterr().out == want
    memory = load_memory("m.safetensors")
    assert memory.tokens == 4 + 150 + len("User: ") + 1 and memory.sources[1]["kind"] == "audio"
    main(["memory", "write", "run", "a.png", "--out", "other.safetensors"])  # the memory matters
    capsys.readouterr()
    main(["memory", "ask", "run", "--memory", "other.safetensors", *ASK])
    assert capsys.readouterr().out != want


def test_a_conversation_may_follow(place, capsys):
    """A question is its next message, after everything before."""
    main(["memory", "write", "run", "a.png", "--out", "m.safetensors"])
    model, tokenizer = load("run")
    template, memory = load_template(place / "run", tokenizer), load_memory("m.safetensors", model)
    engine = Engine(model, slots=1).start()
    conversation = Conversation(engine, tokenizer, template, memory)
    said = "".join(conversation.say("What?", SamplingParams(temperature=0), max_tokens=5))
    save(conversation.memory, "later.safetensors")
    assert load_memory("later.safetensors").pending
    want = "".join(conversation.say("And?", SamplingParams(temperature=0), max_tokens=12))
    engine.close()
    capsys.readouterr()
    main(["memory", "ask", "run", "--memory", "later.safetensors", *ASK[:-1], "And?"])
    assert said and capsys.readouterr().out == want + "\n"


def test_text_may_follow(place, capsys):
    main(["memory", "write", "run", "a.png", "--out", "a.safetensors"])
    main(["memory", "write", "run", "c.txt", "--memory", "a.safetensors", "--out", "more.safetensors"])
    main(["memory", "write", "run", "c.txt", "--out", "c.safetensors"])
    main(["memory", "merge", "a.safetensors", "c.safetensors", "--out", "both.safetensors"])
    said = []
    for name in ("a", "more", "both"):
        capsys.readouterr()
        main(["memory", "ask", "run", "--memory", f"{name}.safetensors", *ASK])
        said.append(capsys.readouterr().out)
    assert len(set(said)) == 3


def test_what_is_refused(place, capsys):
    for command, why in (
        (["a.png", "c.txt"], "c.txt is no picture or sound: a memory is of these, or of text"),
        (["none.wav"], "none.wav"),
        (["b.wav", "--separate"], "begins anew, with all of them: leave out --memory and --separate"),
    ):
        with pytest.raises(SystemExit):
            main(["memory", "write", "run", *command, "--out", "m.safetensors"])
        said = capsys.readouterr().err
        assert why in said and said.count("\n") == 1 and not (place / "m.safetensors").exists()
    save_model("blind", build(retnet(vocab_size=257, dim=32, layers=2, heads=2)), ByteTokenizer())
    with pytest.raises(SystemExit):
        main(["memory", "write", "blind", "b.wav", "--out", "m.safetensors"])
    assert "the model has no encoder for audio" in capsys.readouterr().err
