"""Every file in recipes/ is a recipe: its function returns a complete run or comparison with models that build."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from retentive.cli.train import read_recipe
from retentive.compare import Comparison
from retentive.data.archives import Archives, Row
from retentive.data.chats import chats
from retentive.linearization import LinearizeRun
from retentive.models import build, transformer
from retentive.models.students import student
from retentive.train import TrainRun

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[1] / "recipes"
ARCHIVES = Archives()
RECIPES = sorted(path for path in FOLDER.glob("*.py") if not path.stem.startswith("linearize_"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe(recipe):
    kind = Comparison if recipe.stem.startswith("compare_") else TrainRun
    made, rest = read_recipe(["--recipe", str(recipe), "--steps", "1"], kind)
    assert rest == ["--steps", "1"] and made.train.steps > 1
    runs = [made] if isinstance(made, TrainRun) else [made.train_run(run) for run in made.plan()]
    for run in runs:
        if run.model in ("retnet", "transformer", "hybrid"):  # others need the extra `peers`
            with torch.device("meta"):
                model = build(run.config(4096))
            assert model.config.name.lower() == run.model


@pytest.mark.parametrize("recipe", sorted(FOLDER.glob("linearize_*.py")), ids=lambda path: path.stem)
def test_recipe_of_a_student(recipe):
    made, _ = read_recipe(["--recipe", str(recipe)], LinearizeRun)
    made.check()
    layers = len(made.window) if isinstance(made.window, tuple) else 3
    teacher = transformer(vocab_size=99, dim=64, layers=layers, heads=4, kv_heads=2)
    assert student(teacher, window=made.window or None, sinks=made.sinks).constant_state
    stages = made.stages(Path("begin"), (Path("data"),))
    assert [run.train.steps > 1 for run in stages] == [True] * len(stages) and stages[-1].out == made.out


def prepared(recipe: str, *args: str, cwd: Path) -> str:
    """Returns the output of a recipe run as a program, which prepares its data."""
    program = Path(__file__).parents[1] / "recipes" / recipe
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(cwd), *sys.path])}
    done = subprocess.run([sys.executable, program, *args], cwd=cwd, env=env, capture_output=True, text=True)
    return done.stderr.strip()


def test_texts_with_facts_ask_for_what_they_told(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("".join(f"Line number {n} says little.\n" for n in range(900)))
    assert prepared("linearize_smollm2.py", "mine", "facts", cwd=tmp_path) == ""
    texts = [path.read_text().splitlines() for path in sorted((tmp_path / "facts").iterdir())]
    assert len(texts) == 600 and len({"\n".join(text) for text in texts}) == 600
    for text in texts[:20]:
        asked = text[-12:]
        told = [line for line in text[:-12] if not line.startswith("Line number")]
        assert len(told) == 12 and 4000 < sum(map(len, text)) < 8000
        values = {line.rstrip(".").split(" is ")[-1] for line in told}
        assert {line.rstrip(".").split(" is ")[-1].split("Answer: ")[-1] for line in asked} == values
    assert "no .txt file" in prepared("linearize_smollm2.py", "facts/none", "more", cwd=tmp_path)
    assert prepared("linearize_smollm2.py", cwd=tmp_path).startswith("SmolLM2-135M-Instruct")


def turns(path: Path) -> list[list[str]]:
    return [[message["content"] for message in each.messages] for each in chats(path)]


def test_sentence_pairs_both_ways(tmp_path):
    (tmp_path / "a").write_text("one\n\ntwo\n", encoding="utf-8")
    (tmp_path / "b").write_text("eins\nnichts\nzwei\n", encoding="utf-8-sig")
    said = prepared("translate.py", "English", "a", "German", "b", "pairs/train.jsonl", cwd=tmp_path)
    assert said == "1 of 3 pairs are left out: one of their lines is blank"
    both = turns(tmp_path / "pairs/train.jsonl")
    assert both == [["To German: one", "eins"], ["To English: eins", "one"],
                    ["To German: two", "zwei"], ["To English: zwei", "two"]]  # fmt: skip
    assert [path.name for path in (tmp_path / "pairs").iterdir()] == ["train.jsonl"]
    prepared("translate.py", "English", "a", "German", "b", "pairs/valid.jsonl", cwd=tmp_path)
    assert (
        turns(tmp_path / "pairs/to-german.jsonl") == both[::2]
        and turns(tmp_path / "pairs/to-english.jsonl") == both[1::2]
    )
    (tmp_path / "b").write_text("eins\n", encoding="utf-8")
    said = prepared("translate.py", "English", "a", "German", "b", "pairs/new.jsonl", cwd=tmp_path)
    assert said == "a has 3 lines and b 1: line n must be line n's translation"
    said = prepared("translate.py", "English", "none", "German", "b", "pairs/new.jsonl", cwd=tmp_path)
    assert said.startswith("two files of UTF-8 text are read") and "'none'" in said and "\n" not in said
    assert not (tmp_path / "pairs/new.jsonl").exists()


def test_texts_with_questions(tmp_path):
    meeting = {
        "meeting_transcripts": [{"speaker": "Ann", "content": "Hello."}, {"speaker": "Bob", "content": "Bye."}],
        "general_query_list": [{"query": "What?", "answer": "Greetings."}],
        "specific_query_list": [{"query": "Who?", "answer": "Ann and Bob."}],
    }
    rows = [meeting, {"source": ["A.", "B."], "target": ["Letters.", "ABC."]}, {"document": "Long.", "summary": "L."}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert prepared("summarise.py", "in.jsonl", "out/train.jsonl", cwd=tmp_path) == ""
    said = "Ann: Hello.\nBob: Bye."
    assert turns(tmp_path / "out/train.jsonl") == [
        [f"{said}\n\nWhat?", "Greetings.", "Who?", "Ann and Bob."],
        ["A. B.\n\nSummarise this.", "Letters."],
        ["Long.\n\nSummarise this.", "L."],
    ]
    documents = (tmp_path / "out/documents.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in documents] == [{"text": said}, {"text": "A. B."}, {"text": "Long."}]
    assert prepared("summarise.py", "in.jsonl", "out/asked.jsonl", cwd=tmp_path) == ""
    assert turns(tmp_path / "out/asked.jsonl")[:2] == [[f"{said}\n\nWhat?", "Greetings."],
                                                      [f"{said}\n\nWho?", "Ann and Bob."]]  # fmt: skip
    for bad, why in (
        ({"document": " ", "summary": "x"}, "no text, or nothing is asked of it"),
        ({"document": "x", "summary": ""}, "no answer to 'Summarise this.'"),
        ({"text": "x"}, "expected document and summary, or SciTLDR's or QMSum's fields, got text"),
        ([], "expected an object, got list"),
        ({"meeting_transcripts": [{"speaker": "A"}]}, "a field is missing: 'content'"),
    ):
        (tmp_path / "bad.jsonl").write_text("\n" + json.dumps(bad))
        assert prepared("summarise.py", "in.jsonl", "bad.jsonl", "out/new.jsonl", cwd=tmp_path) == f"bad.jsonl:2: {why}"
    assert not (tmp_path / "out/new.jsonl").exists()


def test_small_talk(tmp_path):
    # replaces the package, with the same interface
    (tmp_path / "chitchat_dataset.py").write_text("""
class Dataset(dict):
    def __init__(self):
        for n in range(200):
            said = [[{"text": f"Hi {n}"}, {"text": " you"}], [{"text": "Hello"}], [{"text": " "}], [{"text": "Well?"}]]
            self[str(n)] = {"messages": said if n else said[:1]}
""")
    assert prepared("dialogue.py", "chats", cwd=tmp_path) == ""
    train, valid = (turns(tmp_path / "chats" / f"{name}.jsonl") for name in ("train", "valid"))
    assert ["Hi 1\nyou", "Hello\nWell?"] in [*train, *valid]  # consecutive messages of one speaker are joined
    assert len(train) + len(valid) == 199 and 0 < len(valid) < 20  # a message without an answer is left out


def held(path: Path) -> bytes | np.ndarray:
    """Returns the member of an archive, or the row of an array."""
    found = ARCHIVES.read(path, 1 << 20)
    return found.values if isinstance(found, Row) else found


def shown(path: Path) -> list[tuple[list[str], list[str], str]]:
    """Returns (files, texts, answer) of each conversation in a file."""
    found = []
    for line in path.read_text().splitlines():
        *_, question, answer = json.loads(line)["messages"]
        files = [part[part["type"]] for part in question["content"] if part["type"] != "text"]
        texts = [part["text"] for part in question["content"] if part["type"] == "text"]
        assert all(len(held(path.parent / file)) for file in files)
        found.append((files, texts, answer["content"]))
    return found


def test_digits_to_see(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="pictures need pip install 'retentive[multimodal]'")
    random = np.random.default_rng(0)
    pixels, labels = random.integers(0, 256, (60, 6, 6), np.uint8), np.arange(60) % 10
    split = {"x_train": pixels[:40], "y_train": labels[:40], "x_test": pixels[40:], "y_test": labels[40:]}
    np.savez(tmp_path / "digits.npz", **split)
    assert prepared("see.py", "digits.npz", "out", cwd=tmp_path) == ""
    out = tmp_path / "out"

    def label(file: str) -> str:
        """Returns the label according to the picture's own pixels, moved or not."""
        of = range(40) if file.startswith("train.npy") else range(40, 60)
        (found,) = [n for n in of if any(np.array_equal(held(out / file), each) for each in moved[n])]
        return str(labels[found])

    moved = [[np.pad(each, 2)[y : y + 6, x : x + 6] for y in range(5) for x in range(5)] for each in pixels]
    trained = [json.loads(line)["messages"] for line in (out / "train.jsonl").read_text().splitlines()]
    assert len(trained) == 2 * 38 and len(shown(out / "valid.jsonl")) == 2
    for messages in trained:
        first, *further = messages[::2]
        files = [part["image"] for part in first["content"] if part["type"] == "image"]
        assert 1 <= len(files) <= 16 and len(further) <= 3
        assert all(len(question["content"]) == 1 for question in further), "the pictures are shown once"
        for question, answer in zip([first, *further], messages[1::2], strict=True):
            words = [part["text"] for part in question["content"] if part["type"] == "text"][-1]
            k = int(words.split()[-1][:-1]) if "number" in words else 1
            assert answer["content"] == label(files[k - 1])
    assert any(len(messages) > 2 for messages in trained)
    tested = shown(out / "test.jsonl")
    assert len(tested) == 20 and all(answer == label(files[0]) for files, _, answer in tested)
    assert np.array_equal(held(out / "test.npy[0]"), pixels[40])
    with image.open(out / "pictures/test-0.png") as picture:
        assert np.array_equal(np.asarray(picture), pixels[40])
    assert all(texts == ["Which digit?"] * 2 for _, texts, _ in shown(out / "around.jsonl"))
    assert any(answer != label(files[0]) for files, _, answer in shown(out / "shuffled.jsonl"))
    for files, texts, answer in shown(out / "row16-3.jsonl"):
        assert len(files) == 16 and answer == label(files[2])
        assert texts == [*(f"{k}:" for k in range(1, 17)), "Which digit is number 3?"]


def test_emoji_to_name(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="pictures need pip install 'retentive[multimodal]'")
    folder = tmp_path / "package/img/google/64"
    folder.mkdir(parents=True)
    random, emoji = np.random.default_rng(0), []
    for n in range(30):
        tones = {tone: {"image": f"{n}-{tone}.png"} for tone in "ab"} if n < 10 else {}
        for file in (f"{n}.png", *(tone["image"] for tone in tones.values())):
            image.fromarray(random.integers(0, 256, (64, 64, 4), np.uint8)).save(folder / file)
        of_all = {"name": f"NAME {n}", "image": f"{n}.png", "has_img_google": n != 29}
        emoji.append(of_all | ({"skin_variations": tones} if tones else {}))
    (tmp_path / "package/emoji.json").write_text(json.dumps(emoji))
    assert prepared("emoji.py", "package", "out", cwd=tmp_path) == ""
    out = tmp_path / "out"
    assert (out / "names.txt").read_text().splitlines() == sorted(f"name {n}" for n in range(29))
    trained, kin, new = ({(files[0].split("+")[0].removesuffix(".png"), answer) for files, _, answer in shown(
        out / f"{name}.jsonl")} for name in ("train", "kin", "new"))  # fmt: skip
    assert len(trained) == 45 and len(kin | new) == 4  # 49 pictures, one in ten held out
    assert not trained & (kin | new) and all(file.split("/")[1].split("-")[0] == name[5:] for file, name in trained)
    names = {name for _, name in trained}
    assert {name for _, name in kin} <= names and not {name for _, name in new} & names
    assert len(shown(out / "train.jsonl")) == 13 * 45
    for files, _, _ in shown(out / "train.jsonl") + shown(out / "valid.jsonl"):
        with image.open(io.BytesIO(held(out / files[0]))) as picture:
            assert picture.size == (64, 64)
    with image.open(io.BytesIO(held(out / "pictures.zip/0.png"))) as picture, image.open(folder / "0.png") as own:
        assert np.array_equal(np.asarray(picture), np.asarray(own))


def test_digits_to_hear(tmp_path):
    soundfile = pytest.importorskip("soundfile", reason="sound needs pip install 'retentive[multimodal]'")
    pytest.importorskip("soxr", reason="sound needs pip install 'retentive[multimodal]'")
    (tmp_path / "in").mkdir()
    random = np.random.default_rng(0)
    for speaker in ("ann", "bob", "cy"):
        for digit in range(10):
            soundfile.write(tmp_path / f"in/{digit}_{speaker}_0.wav", random.standard_normal(800) / 9, 8000)
    done = prepared("listen.py", "in", "out", "eve", cwd=tmp_path)
    assert done == "no recordings by 'eve' in in: expected one of ann, bob, cy" and not (tmp_path / "out").exists()
    done = prepared("listen.py", "in", "out", "bob", "nowhere", cwd=tmp_path)
    assert done == "no recordings in nowhere: expected DIGIT_VOICE_NUMBER.wav" and not (tmp_path / "out").exists()
    # the recipe with twenty sounds for training, and three rows of each number
    recipe = (Path(__file__).parents[1] / "recipes/listen.py").read_text()
    small, replaced = re.subn(r"^TRAINED, ROWS = .*$", "TRAINED, ROWS = 20, 3", recipe, flags=re.MULTILINE)
    assert replaced == 1, "the recipe names its numbers otherwise"
    (tmp_path / "small.py").write_text(small)
    assert prepared(str(tmp_path / "small.py"), "in", "out", "bob", cwd=tmp_path) == ""
    out = tmp_path / "out"
    assert [answer for _, _, answer in shown(out / "bob.jsonl")] == [str(n) for n in range(10)]
    assert {len(answer.split()) for _, _, answer in shown(out / "train.jsonl")} <= {1, 2, 3, 4, 5}
    for files, texts, answer in shown(out / "row50.jsonl"):
        sound, rate = soundfile.read(io.BytesIO(held(out / files[0])))
        assert rate == 8000 and len(answer.split()) == 50 and texts == ["Which digits?"]
        assert 50 * 800 <= len(sound) <= 50 * (800 + 1600)
    for line in (out / "turns50.jsonl").read_text().splitlines():
        assert [m["role"] for m in json.loads(line)["messages"]] == ["user", "assistant"] * 50
    assert all(len(answer) == 1 for _, _, answer in shown(out / "turns50.jsonl"))
    assert len(shown(out / "known.jsonl")) == 2 and len(shown(out / "train.jsonl")) == 20
    # synthetic voices, silent here: part of the training set, none of the test set
    (tmp_path / "voices").mkdir()
    for digit in range(10):
        soundfile.write(tmp_path / f"voices/{digit}_robot_0.wav", np.zeros(4000), 8000)
    assert prepared(str(tmp_path / "small.py"), "in", "mixed", "bob", "voices", cwd=tmp_path) == ""
    assert len(shown(tmp_path / "mixed/train.jsonl")) == 20
    for name in ("known", "bob", "turns5"):
        files = [file for files, _, _ in shown(tmp_path / f"mixed/{name}.jsonl") for file in files]
        lengths = [len(soundfile.read(io.BytesIO(held(tmp_path / "mixed" / file)))[0]) for file in files]
        assert lengths and max(lengths) <= 800 + 1600, "no recording of half a second among them"
