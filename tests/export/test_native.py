"""Folders of C: built and run here, for Arm under qemu, and by Java; what they write is what torch writes."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from retentive.checkpoint import load, save_model
from retentive.cli import main
from retentive.data.tokenizer import BPETokenizer, ByteTokenizer, train_bpe
from retentive.export import folder, native
from retentive.models import load_state
from retentive.models.encoders import AudioConfig, with_encoders
from retentive.native.library import FOLDER, OPS
from tests.export.variants import ATTENDING, peaked, peaked_model

ASK = ["--prompt", "It's", "--temperature", "0", "--max-tokens", "20"]
FASTER = "-DINSTRUCTIONS=-O1"
"""It comes after -O3: less to wait for. `tests/native` runs what -O3 makes."""
needs_compiler = pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
needs_cmake = pytest.mark.skipif(not shutil.which("cmake"), reason="needs cmake")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a run, its words learnt from a little text, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    tokenizer = train_bpe(["the days of it isn't don't we'll see 1990 été naïve 東京 — « » end\n\n\t" * 20], 400)
    save_model("run", peaked(vocab_size=tokenizer.vocab_size), tokenizer, template="{{ messages[0].content }}")
    return tmp_path


def written(*command) -> str:
    """Return the output of the program, the same prompt first."""
    done = subprocess.run([*map(str, command), "-p", "It's", "-n", "20", "-t", "0"], capture_output=True, check=True)
    return done.stdout.decode(errors="replace")


def generated(source, capsys) -> str:
    capsys.readouterr()
    main(["generate", source, *ASK])  # which writes the prompt too
    return capsys.readouterr().out


@needs_compiler
@needs_cmake
def test_the_folder_is_built_and_writes_what_the_model_writes(place, capsys):
    main(["export", "run", "--to", "native", "--out", "made"])
    assert "made/model: " in (said := capsys.readouterr().err) and "logits differ from torch's by " in said
    assert sorted(p.name for p in (place / "made").iterdir()) == [
        "CMakeLists.txt",
        "README.md",
        "c",
        "model",
        "write.c",
    ]
    assert sorted(p.name for p in (place / "made/model").iterdir()) == [
        "chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    for file in (place / "made/c").iterdir():
        assert file.read_bytes() == next(f for f in (FOLDER / file.name, OPS / file.name) if f.exists()).read_bytes()
    for command in (["-B", "build", "made", FASTER], ["--build", "build"]):
        subprocess.run(["cmake", *command], check=True, capture_output=True)
    want = generated("run", capsys)
    assert written("build/write", "made/model") == want and len(want) > 20
    assert generated("made/model", capsys) == want


@needs_compiler
@needs_cmake
@pytest.mark.parametrize(
    "kind",
    [*(pytest.param(k, marks=pytest.mark.slow) for k in ("twin", "hybrid, window")), "hybrid, window, convolution"],
)
def test_every_kind_of_block_is_exported_and_written_with(kind, place, capsys):
    """Through a state in a file, which the program goes on from."""
    model = peaked_model(ATTENDING[kind])
    model.head.weight.data[256] = 0  # the end of text is never the likeliest token
    save_model("other", model, ByteTokenizer())
    main(["export", "other", "--to", "native", "--out", "made"])
    for command in (["-B", "build", "made", FASTER], ["--build", "build"]):
        subprocess.run(["cmake", *command], check=True, capture_output=True)
    assert written("build/write", "made/model", "--state", "kept") == (want := generated("other", capsys))
    position = 1 + len(b"It's") + 20
    assert load_state("kept").position.tolist() == [position] and len(want) > 20
    again = ["build/write", "made/model", "--state", "kept", "-p", "It's", "-n", "3"]
    assert subprocess.run(again, capture_output=True, check=True).stdout.startswith(b"It's")
    assert load_state("kept").position.tolist() == [position + 4 + 3]


@needs_compiler
def test_integers(place, capsys):
    sizes = {}
    for weights in ("stored", "int8", "int4"):
        main(["export", "run", "--to", "native", "--out", weights, "--weights", weights])
        sizes[weights] = (place / weights / "model/model.safetensors").stat().st_size
        how = json.loads((place / weights / "model/config.json").read_text()).get("quantization", {})
        assert how.get("bits") == {"stored": None, "int8": 8, "int4": 4}[weights]
    assert sizes["int4"] < sizes["int8"] < 0.3 * sizes["stored"]
    assert capsys.readouterr().err.count("logits differ from torch's by ") == 3


ZIG = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl", "-static"]


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("ziglang") or not shutil.which("qemu-aarch64"), reason="needs ziglang, qemu-aarch64")
def test_the_folder_for_arm(place, capsys):
    main(["export", "run", "--to", "native", "--out", "made"])
    line = next(x for x in (place / "made/README.md").read_text().splitlines() if "`cc " in x)
    command = line.split("`")[1].replace("-march=native ", "").split()
    subprocess.run([*ZIG, *command[1:], "-Wno-unknown-pragmas"], cwd=place / "made", check=True)
    want = generated("run", capsys)
    assert written("qemu-aarch64", "made/write", "made/model") == want


def test_what_is_refused(place, capsys, monkeypatch):
    def fails(source: str, *more: str) -> str:
        with pytest.raises(SystemExit):
            main(["export", source, "--to", "native", "--out", "no", *more])
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1
        assert not Path("no").exists() and not [p for p in place.glob(".no*") if p.suffix != ".lock"]
        return said.err

    assert "--standard is for --to onnx; leave it out" in fails("run", "--standard")
    save_model("hearing", with_encoders(peaked(), {"audio": AudioConfig(token=257)}), ByteTokenizer())
    assert "sees or hears cannot be exported" in fails("hearing")
    save_model("half", peaked().half(), ByteTokenizer())
    assert "it computes in float32 or bfloat16, the model is float16" in fails("half")
    if shutil.which("gcc"):
        vocab = load("run")[0].config.vocab_size
        content = json.loads((place / "run/tokenizer.json").read_text())
        content["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True
        save_model("prefixed", peaked(vocab_size=vocab), BPETokenizer(json.dumps(content)))
        assert "not this model's tokenizer" in fails("prefixed")

        def another(where, model, *more, **named):
            save_model(where, peaked(vocab_size=vocab), *more, **named)

        save_model("tied", peaked(vocab_size=vocab, tie_embeddings=True), load("run")[1])
        with monkeypatch.context() as changed:
            changed.setattr(folder, "save_model", another)
            assert "the export's logits differ from the model's by" in fails("tied")
    (place / "no").mkdir()
    with pytest.raises(SystemExit):
        main(["export", "run", "--to", "native", "--out", "no"])
    assert "no exists" in capsys.readouterr().err


def test_where_no_compiler_is(place, capsys, monkeypatch):
    monkeypatch.setenv("CC", "none-of-this-name")
    main(["export", "run", "--to", "native", "--out", "made"])
    assert "not checked" in capsys.readouterr().err and (place / "made/model/model.safetensors").exists()
    with native.opened(place / "made/model") as library:
        assert library is None


@needs_compiler
def test_the_library_by_python(place, refuses):
    with native.opened(place / "run") as library:
        assert library is not None
        for wrong in ([], [4000], [-1]):
            with refuses("expected at least one id, each from 0 to"):
                library.read(wrong)
    with refuses("the C library cannot run this model: none/config.json cannot be read"), native.opened(Path("none")):
        pass


PHONE = Path(__file__).parents[2] / "examples" / "phone"
ANDROID = PHONE / "android/app/src/main"


@pytest.mark.slow
@needs_compiler
@needs_cmake
@pytest.mark.skipif(not shutil.which("javac"), reason="needs a JDK")
def test_the_android_app_but_for_its_screen_by_a_jdk(place, capsys, monkeypatch):
    """RetNet.java and glue.c, built as the app builds them, but for this machine."""
    main(["export", "run", "--to", "native", "--out", "made"])
    sources = [ANDROID / "java/org/retentive/phone/RetNet.java", Path(__file__).with_name("Write.java")]
    subprocess.run(["javac", "-Xlint:all", "-Werror", "-h", "heads", "-d", "classes", *sources], check=True)
    jdk = Path(shutil.which("javac")).resolve().parents[1] / "include"
    head = place / "heads/org_retentive_phone_RetNet.h"  # what javac wants of C, which its compiler then checks
    monkeypatch.setenv("CFLAGS", f"-include {head} -I{jdk} -I{jdk}/linux")
    flags = [f"-DRETENTIVE={place}/made", FASTER]
    for command in (["-B", "jni", ANDROID / "cpp", *flags], ["--build", "jni"]):
        subprocess.run(["cmake", *command], check=True, capture_output=True)
    java = ["java", "-Xcheck:jni", "-Djava.library.path=jni", "-cp", "classes", "Write"]
    state = str(place / "state.safetensors")
    done = subprocess.run([*java, "made/model", "It's", "20", state], capture_output=True, check=True)
    want = generated("run", capsys).removeprefix("It's").removesuffix("\n").replace("\n", "\\n").replace("\r", "\\r")
    want = want.removesuffix("\ufffd")  # a letter that is not whole yet, for which the app waits
    assert done.stdout.decode().split("\n")[:-1] == [
        "refused read a text first",
        f"text {want}",
        "forgot 0",
        "loaded true",
        "same true",
        "refused made/model cannot be read",
        "drawn true",
        "refused made/model-none/config.json cannot be read",
    ]
    assert b"WARNING" not in done.stdout + done.stderr  # of -Xcheck:jni
    assert load_state(state).position.tolist() == [1 + len(load("run")[1].encode("It's")) + 20]
