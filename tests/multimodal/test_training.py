"""Conversations with pictures and sound, from files to a trained model: packed, trained, resumed, loaded, quantised."""

import io
import json
import re
import shutil

import numpy as np
import pytest
import torch

from retentive.models import LanguageModel

pytest.importorskip("PIL", reason="pictures need pip install 'retentive[multimodal]'")
pytest.importorskip("soundfile", reason="sound needs pip install 'retentive[multimodal]'")
pytest.importorskip("soxr", reason="sound needs pip install 'retentive[multimodal]'")
pytest.importorskip("jinja2", reason="chat templates need pip install 'retentive[serve]'")

import soundfile
from PIL import Image

from retentive.checkpoint import ModelFolder, load, save_model
from retentive.checkpoint.quantize import quantize
from retentive.cli import main
from retentive.compare.comparison import Comparison
from retentive.data.chats import chats
from retentive.data.media import rows_of
from retentive.data.packed import Packed
from retentive.data.templates import load_template
from retentive.data.tokenizer import ByteTokenizer
from retentive.evals import evaluate
from retentive.evals.generation_tasks import loss
from retentive.evals.heldout import held_out_loss
from retentive.infer import batch
from retentive.models.encoders import embedded
from retentive.multimodal import Opener, open_audio, open_image, prepare
from retentive.train import SftRun, TrainConfig, TrainRun
from retentive.train.initial import encoders_for

IMAGE = {"size": 8, "patch": 4, "channels": 1}
AUDIO = {"rate": 8000, "mels": 8, "stack": 2}
ASKED = {"dark": 0, "light": 255}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Eighty conversations: a picture is dark or light, a sound low or high, and some have both."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    (tmp_path / "files").mkdir()
    lines = []
    for n in range(80):
        name, level = list(ASKED.items())[n % 2]
        noise = random.integers(0, 60, (8, 8))
        Image.fromarray(np.abs(level - noise).astype(np.uint8)).save(tmp_path / f"files/{n}.png")
        pitch, hertz = ("low", 200) if n % 3 else ("high", 2000)
        tone = np.sin(2 * np.pi * hertz * np.arange(800 + 80 * (n % 4)) / 8000)
        soundfile.write(tmp_path / f"files/{n}.wav", tone / 2, 8000)
        parts = [{"type": "image", "image": f"files/{n}.png"}, {"type": "text", "text": "Dark?"}]
        turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": name}]
        if n % 4 == 0:
            heard = [{"type": "text", "text": "And"}, {"type": "audio", "audio": f"files/{n}.wav"}]
            turns += [{"role": "user", "content": heard}, {"role": "assistant", "content": pitch}]
        lines.append(json.dumps({"messages": turns}) + "\n")
    (tmp_path / "train.jsonl").write_text("".join(lines[:64]))
    (tmp_path / "valid.jsonl").write_text("".join(lines[64:]))
    return tmp_path


def packed(**changes) -> Packed:
    how = {"image": IMAGE, "audio": AUDIO, "valid": "valid.jsonl", "tokenizer": "bytes", **changes}
    prepare("train.jsonl", "data", **how)
    return Packed("data")


TINY = {"dim": 32, "layers": 1, "heads": 1}
EYES = {"image.layers": 1, "image.dim": 16, "audio.dim": 16}
TRAINED = {
    "size": "1m",
    "set": TINY | EYES,
    "mode": "whole",
    "batch": 2,
    "length": 128,
    "warmup": 5,
    "lr": 2e-2,
    "precision": "fp32",
    "device": "cpu",
    "eval_every": 50,
    "sample_every": 0,
}


def test_what_is_packed_is_what_the_files_hold(place):
    data = packed()
    stream = data.stream("valid")
    (batch, *_) = data.held_out(length=128)
    image, audio = (data.media[kind]["token"] for kind in ("image", "audio"))
    assert (image, audio) == (257, 258)  # beyond the bytes and the end of text
    ids = batch.ids[0].tolist()
    config = encoders_for(data, "", {})
    want = open_image(place / "files/64.png", config["image"])
    heard = open_audio(place / "files/64.wav", config["audio"])
    assert ids.count(image) == 4 == len(want) and ids.count(audio) == len(heard) > 2
    assert np.array_equal(batch.rows["image"].numpy(), want) and np.array_equal(batch.rows["audio"].numpy(), heard)
    # each batch has the rows of its own placeholders, wherever it begins
    for batch in [*data.held_out(length=128), *(data.batches(mode="whole", batch=2, length=128)[n] for n in range(9))]:
        for kind in ("image", "audio"):
            assert len(batch.rows[kind]) == int((batch.ids == data.media[kind]["token"]).sum())
    text = data.tokenizer.decode([id for id in ids if id < 257])
    assert text.startswith("User: Dark?\nAssistant: dark") and "User: And\nAssistant: low" in text
    assert stream.tokens == data.meta.splits["valid"].tokens


def hidden(model, ids, rows):
    return model.hidden(ids, embeds=embedded(model, ids, rows))[0]


def test_it_is_learnt_resumed_and_loaded(place, same):
    data = packed()
    TrainRun.of("data", "run", steps=60, save_every=30, keep=2, **TRAINED).run(quiet=True)
    model, tokenizer = load("run")
    found = held_out_loss(model, data, length=128)
    assert found.loss < 0.35  # guessing between two words of about four bytes would give about 0.2 + log(2) / 4
    # stopped half-way and resumed: identical to the bit
    shutil.rmtree(place / "run/checkpoints/step-00000060")
    whole = (place / "run/model.safetensors").read_bytes()
    TrainRun.of("data", "run", steps=60, save_every=30, keep=2, resume=True, **TRAINED).run(quiet=True)
    assert (place / "run/model.safetensors").read_bytes() == whole
    # the answer depends on the picture and the sound
    batches = [b for b in data.held_out(length=128)]
    blind = {"image": torch.zeros_like(batches[0].rows["image"]), "audio": batches[0].rows["audio"]}
    seen, unseen = (hidden(model, batches[0].ids, rows) for rows in (batches[0].rows, blind))
    assert (seen - unseen).abs().max() > 0.01
    # saved and loaded again, and quantised
    save_model("copy", model, tokenizer)
    again = load("copy")[0]
    same(hidden(again, batches[0].ids, batches[0].rows), seen, 0)
    small = quantize(model, 8)
    save_model("small", small, tokenizer)
    small, _ = load("small", dtype=torch.float32)
    assert held_out_loss(small, data, length=128).loss == pytest.approx(found.loss, abs=0.1)


def test_eyes_for_a_model_that_has_none(place, refuses):
    data = packed()
    torch.manual_seed(0)
    config = TrainRun.of("data", "base", size="1m", set=TINY).config(257)
    save_model("base", LanguageModel(config), data.tokenizer)
    how = {k: v for k, v in TRAINED.items() if k not in ("size", "set")}
    run = TrainRun.of("data", "seeing", init="base", set=EYES, steps=1, **{**how, "lr": 1e-9})
    run.run(quiet=True, overrides={"init", "steps", "lr"})
    before, after = load("base")[0].state_dict(), load("seeing")[0].state_dict()
    assert all((after[name] - x).abs().max() < 1e-6 for name, x in before.items())
    assert set(ModelFolder.open(place / "seeing").encoders) == {"image", "audio"}
    # continue from there with the same encoders, on data encoded alike
    TrainRun.of("data", "more", init="seeing", steps=1, **how).run(quiet=True, overrides={"init", "steps"})
    with refuses("`init='seeing'` brings its encoder of image: leave out `set={'image.dim': 8}`"):
        run = TrainRun.of("data", "no", init="seeing", set={"image.dim": 8}, steps=1, **how)
        run.run(quiet=True, overrides={"init"})
    packed(image={**IMAGE, "patch": 2}, overwrite=True)
    with refuses("seeing has image patch 4, data has 2: pack the data alike"):
        TrainRun.of("data", "no", init="seeing", steps=1, **how).run(quiet=True, overrides={"init"})


def test_what_cannot_become_a_model_that_sees_is_refused(place, refuses):
    """Before anything is trained, in one line."""
    packed()
    config = TrainRun.of("data", "base", size="1m", set=TINY).config(257)
    save_model("base", LanguageModel(config), ByteTokenizer())
    how = {k: v for k, v in TRAINED.items() if k not in ("size", "set")}
    with refuses("base has no encoder of audio, image, and `lora` would leave a new one as it was drawn"):
        TrainRun.of("data", "no", init="base", lora=2, steps=1, **how).run(quiet=True, overrides={"init"})
    with refuses("data holds image and audio, and compare is for text"):
        Comparison(place / "data", place / "no").check()
    TrainRun.of("data", "seeing", steps=1, **TRAINED).run(quiet=True)
    packed(tokenizer="train", vocab_size=270, overwrite=True)  # changes the placeholders too
    with refuses("seeing has another tokenizer than data: pack the text with the tokenizer of seeing"):
        TrainRun.of("data", "no", init="seeing", steps=1, **how).run(quiet=True, overrides={"init"})
    assert not (place / "no").exists()


def test_another_librarys_model_reads_ids_alone(place, refuses):
    pytest.importorskip("transformers", reason="models of other libraries need pip install 'retentive[peers]'")
    packed()
    how = {k: v for k, v in TRAINED.items() if k != "set"}
    with refuses("a llama reads ids alone, and data holds image, audio"):
        TrainRun.of("data", "no", model="llama", steps=1, **how).run(quiet=True)
    assert not (place / "no").exists()


def test_a_template_leaves_room_to_ask(place, refuses):
    (place / "plain.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    part = {"type": "image", "image": "files/0.png"}
    for parts in ([part], [part, {"type": "text", "text": "Dark?"}]):
        turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "dark"}]
        (place / "few.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
        how = {"image": IMAGE, "tokenizer": "bytes", "template": place / "plain.jinja", "valid_fraction": 0.0}
        if len(parts) > 1:
            prepare("few.jsonl", "plain", **how)
            continue
        with refuses("few.jsonl:1: the template puts nothing between a picture or sound and the answer"):
            prepare("few.jsonl", "plain", **how)


def test_fine_tuning_reads_whole_conversations(place):
    packed()
    TrainRun.of("data", "run", steps=1, **TRAINED).run(quiet=True)
    how = TrainConfig(steps=1, warmup=1, sample_every=0, precision="fp32", device="cpu")
    SftRun("data", place / "tuned", init="run", length=128, train=how).run(quiet=True)
    assert json.loads((place / "tuned/train.json").read_text())["command"]["mode"] == "whole"
    assert set(ModelFolder.open(place / "tuned").encoders) == {"image", "audio"}
    # the same from the files themselves, encoded as by the model
    SftRun("train.jsonl", place / "more", init="run", valid="valid.jsonl", length=128, train=how).run(quiet=True)
    (folder,) = place.glob("more-data-*")
    assert (
        Packed(folder).media == Packed("data").media
        and ModelFolder.open(place / "more").encoders == ModelFolder.open(place / "run").encoders
    )
    run = SftRun("train.jsonl", place / "more", init="run", valid="valid.jsonl", length=128, train=how)
    assert run.folder([]) == folder
    shutil.copy("files/1.png", "files/0.png")  # another picture of the same name: packed again
    assert run.folder([]) != folder
    pixels = np.zeros((80, 8, 8), np.uint8)
    np.save("pics.npy", pixels)
    lines = (place / "train.jsonl").read_text()
    (place / "train.jsonl").write_text(re.sub(r"files/(\d+)\.png", r"pics.npy[\1]", lines))
    folder = run.folder([])
    np.save("pics.npy", pixels + 1)  # other pixels in an array of the same name
    assert run.folder([]) != folder
    (place / "train.jsonl").write_text(lines)
    main(["data", "train.jsonl", "--chats", "--tokenizer", "run", "--out", "again"])
    assert Packed("again").media == Packed("data").media


def test_the_loss_of_answers_about_pictures(place):
    packed()
    TrainRun.of("data", "run", steps=60, **TRAINED).run(quiet=True)
    model, tokenizer = load("run")
    template = load_template(place / "run", tokenizer)
    conversations = list(chats("valid.jsonl", media=Opener.of(model)))
    (row,) = loss(model, template, conversations, max_length=None)
    total = count = 0.0
    for each in conversations:  # by the definition: each token given those before it
        ids, taught = template.taught([each.messages])[0]
        begin = len(ids) - taught[::-1].index(False)
        rows = {kind: torch.from_numpy(x) for kind, x in rows_of(each.messages).items()}
        with torch.no_grad():
            logprobs = model.head(hidden(model, torch.tensor([ids]), rows))[0].log_softmax(-1)
        total -= float(logprobs[begin - 1 : -1].gather(1, torch.tensor(ids[begin:])[:, None]).sum())
        count += len(ids) - begin
    assert row["value"] == pytest.approx(total / count, rel=1e-3)  # float32, a few tokens of a sharp model
    assert count == sum(len(each.messages[-1]["content"]) + 2 for each in conversations)


def test_pictures_in_a_talk(place, capsys, monkeypatch):
    packed()
    TrainRun.of("data", "run", steps=60, **TRAINED).run(quiet=True)
    lines = "/show files/64.png\nDark?\n/forget\n/show files/65.png\nDark?\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    main(["chat", "run", "--temperature", "0"])
    said = capsys.readouterr().out.splitlines()
    assert said == ["files/64.png: 4 tokens, read with the next message", "dark", "forgotten",
                    "files/65.png: 4 tokens, read with the next message", "light"]  # fmt: skip
    for wrong, why in (
        ("/show train.jsonl", "/show needs a picture or a sound (.png"),
        ("/show", "/show needs a picture or a sound (.png"),
        ("/show files/none.png", "no file at files/none.png"),
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO(wrong + "\nDark?\n"))
        with pytest.raises(SystemExit):
            main(["chat", "run"])
        said = capsys.readouterr()
        assert why in said.err and said.err.count("\n") == 1 and said.out == ""


def test_what_is_refused(place, refuses):
    data = packed()
    with refuses("`mode='reset'`: data with image and audio need another; set `mode='whole'`"):
        data.batches(batch=2, length=64)
    with refuses("tokens, a row 16: set `length="):
        data.batches(mode="whole", batch=2, length=16)
    for changes, why in (
        ({"image.size": 9}, "`set={'image.size': 9}`: the data decide it"),
        ({"image.colour": 9}, "`set={'image.colour': 9}`: it has dim, heads, layers"),
        ({"image.layers": -1}, "`set={'image.layers': -1}`: layers must be at least 0, got -1"),
        ({"video.dim": 9}, "`set={'video.dim': 9}`: data holds nothing of that kind"),
    ):
        with refuses(why):
            TrainRun.of("data", "no", steps=1, **{**TRAINED, "set": changes}).run(quiet=True)
    assert not (place / "no").exists()
    with refuses("`image` takes no width: it is none of size, patch, channels"):
        prepare("train.jsonl", "new", image={"width": 3})
    with refuses("`image` takes no layers: it is a field of the model, given to training"):
        prepare("train.jsonl", "new", image={"layers": 3})
    with refuses("train.jsonl:1 cannot be taken: it holds audio, but nothing says how audio becomes tokens"):
        prepare("train.jsonl", "new", image=IMAGE, tokenizer="bytes")
    (place / "files/3.png").unlink()
    with refuses("train.jsonl:4 cannot be taken: "):
        prepare("train.jsonl", "new", image=IMAGE, audio=AUDIO, tokenizer="bytes")
    (place / "far.jsonl").write_text(json.dumps({"messages": [
        {"role": "user", "content": [{"type": "image", "image": "https://example.org/a.png"}]},
        {"role": "assistant", "content": "no"}]}))  # fmt: skip
    with refuses("image 'https://example.org/a.png' is no file: download it"):
        prepare("far.jsonl", "new", image=IMAGE, tokenizer="bytes")
    beside = {"conversations": [{"from": "human", "value": "<image>\nDark?"}, {"from": "gpt", "value": "no"}]}
    (place / "beside.jsonl").write_text(json.dumps({**beside, "image": "files/1.png"}))
    with refuses('\'image\' stands beside what is said: put {"type": "image", "image": FILE} into'):
        prepare("beside.jsonl", "new", image=IMAGE, tokenizer="bytes")
    assert not (place / "new").exists()


def test_it_is_judged_by_what_it_answers(place, monkeypatch):
    packed()
    TrainRun.of("data", "run", steps=60, **TRAINED).run(quiet=True)
    lines = [json.loads(line) for line in (place / "valid.jsonl").read_text().splitlines()]
    asked = [{"messages": line["messages"][:2]} for line in lines]
    # a second question about the same picture, which is read once for both
    asked = [again for line in asked for again in (line, line)]
    (place / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    monkeypatch.setattr(batch, "SHARED", 8)  # "User: " and half of a picture
    read, real = [], batch.read
    monkeypatch.setattr(batch, "read", lambda *given: read.append(1) or real(*given))
    found = evaluate("run", "answers", ".", max_tokens=9)
    scores = {row["metric"]: row["value"] for row in found.rows}
    assert scores.pop("loss") < 0.3 and scores == {"exact": 1.0, "ended": 1.0}
    assert len(read) == len(lines) and found.records[0]["question"] == "<files/64.png>Dark?"
    with pytest.raises(ValueError, match="pictures and sound are read whole"):
        evaluate("run", "answers", ".", max_length=9)


def test_a_question_on_the_command_line(place, capsys):
    packed()
    TrainRun.of("data", "run", steps=60, **TRAINED).run(quiet=True)
    ask = ["generate", "run", "--prompt", "Dark?", "--temperature", "0", "--image"]
    for n, (name, _) in enumerate(ASKED.items(), 64):
        main([*ask, f"files/{n}.png"])
        assert capsys.readouterr().out == f"{name}\n"
    for wrong, why in (
        (["files/none.png"], "no file at files/none.png"),
        (["files"], "files is no file"),
        ([], "--image names no file"),
        (["https://example.org/a.png"], "image 'https://example.org/a.png' is no file: download it"),
        (["\x1b[31mred.png"], "no file at \\x1b[31mred.png"),
        (["train.jsonl"], "train.jsonl is no picture of PNG, JPEG, WEBP"),
        (["files/64.png", "--beams", "2"], "--beams, --lookup and --draft are for text alone"),
        (["files/64.png", "--image", "files/65.png"], "--image stands twice: give all its values after one --image"),
    ):
        with pytest.raises(SystemExit):
            main([*ask, *wrong])
        said = capsys.readouterr()
        assert why in said.err and said.err.count("\n") == 1 and said.out == ""
    save_model("blind", LanguageModel(load("run")[0].config), load("run")[1])
    with pytest.raises(SystemExit):
        main(["generate", "blind", "--image", "files/64.png"])
    assert "the model has no encoder for image" in capsys.readouterr().err


def test_on_the_command_line(place, capsys):
    main(["data", "train.jsonl", "--valid", "valid.jsonl", "--chats", "--tokenizer", "bytes", "--out", "data",
          "--image", "size=8", "patch=4", "channels=1", "--audio", "rate=8000", "mels=8", "stack=2"])  # fmt: skip
    shown = capsys.readouterr().out
    assert "next: retentive train --data data --size 5m --out runs/mine --mode whole" in shown
    heading, *splits = [line.split() for line in shown.splitlines()[2:5]]
    counts = [dict(zip(heading[:5], split, strict=False)) for split in splits]  # then "7.2 kB", two words
    assert [(each["pictures"], each["sound"]) for each in counts] == [("64", "0:00:02"), ("16", "0:00:00")]
    main(["train", "--data", "data", "--out", "run", "--size", "1m", "--set", "dim=32", "layers=1", "heads=1",
          "image.layers=1", "image.dim=16", "audio.dim=16", "--mode", "whole", "--batch", "2", "--length", "128",
          "--steps", "2", "--warmup", "1", "--sample-every", "2", "--precision", "fp32"])  # fmt: skip
    said = capsys.readouterr().err
    assert "User: Dark?\n    Assistant:" in said and " 21,216 parameters and 11,240 of encoders, " in said
    assert "steps on cpu" in said and ", fp32, learning rate " in said
    assert Packed("data").media["image"] == {
        "token": 257, "size": 8, "patch": 4, "channels": 1, "features": 16, "dtype": "uint8",
    }  # fmt: skip
    assert ModelFolder.open(place / "run").encoders["image"].layers == 1
    main(["info", "run"])
    shown = capsys.readouterr().out
    assert "image: 4 tokens of a picture, 8 x 8 grey, patches of 4; an encoder of " in shown
    assert "audio: 50 tokens of a second of sound, 8,000 Hz, 8 bands; an encoder of 392 parameters more, " in shown


def test_who_cannot_see_says_so(place, capsys):
    with pytest.raises(SystemExit):
        main(["data", "train.jsonl", "--chats", "--tokenizer", "bytes", "--out", "data"])
    assert "train.jsonl:1 cannot be taken: message 1 holds image: say how" in capsys.readouterr().err
