"""`retentive memory`: what is read once is asked as if it had just been read; stops, goes on, and refuses in a line."""

import shutil
import signal
from pathlib import Path

import pytest
import torch

import retentive
from retentive.checkpoint import save_model
from retentive.cli import main
from retentive.infer import SamplingParams, generate, reading
from retentive.infer.memory import load_memory, show
from retentive.models import build, retnet, twin

STORIES = [f"corpus/{n}.txt" for n in range(3)]
GREEDY = ["--temperature", "0", "--max-tokens", "12"]


def files() -> dict[str, bytes]:
    return {str(f): f.read_bytes() if f.is_file() else b"" for f in Path().rglob("*")}


def write(*argv: str) -> None:
    main(["memory", "write", "run", *argv])


def ids_of(paths: list[str]) -> list[int]:
    """Each document after an end of text, as bytes."""
    return [i for path in paths for i in (256, *Path(path).read_bytes())]


def close(a: str, b: str) -> None:
    """Two files hold the same memory, up to the rounding of other stretches."""
    one, two = load_memory(a), load_memory(b)
    assert one.tokens == two.tokens and one.sources == two.sources and one.model == two.model
    for x, y in zip(one.state.tensors(), two.state.tensors(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


def test_asking_goes_on_from_all_documents(place, capsys):
    write(*STORIES, "--out", "lib.mem")
    told = capsys.readouterr().out
    model, tokenizer = retentive.load("run")
    ids = ids_of(STORIES)
    assert f"lib.mem: {len(ids):,} tokens of 3 documents" in told and "1.txt" in told
    before = files()
    main(["memory", "ask", "run", "--memory", "lib.mem", "--prompt", "The café", *GREEDY])
    assert files() == before
    prompt = ids + tokenizer.encode("The café")
    tokens = generate(model, prompt, SamplingParams(temperature=0), max_tokens=12, stop_ids=[256])
    assert capsys.readouterr().out == "The café" + tokenizer.decode([t.id for t in tokens]) + "\n"
    main(["memory", "show", "lib.mem"])
    assert capsys.readouterr().out == told


def test_going_on_from_a_memory_is_reading_all_of_it(place):
    write(*STORIES, "--out", "whole.mem")
    write(*STORIES[:2], "--out", "lib.mem")
    write(STORIES[2], "--memory", "lib.mem", "--out", "more/new.mem")
    close("more/new.mem", "whole.mem")
    write(STORIES[2], "--memory", "lib.mem", "--out", "lib.mem")
    close("lib.mem", "whole.mem")


def test_a_folder_and_lines_of_jsonl_are_documents(place):
    Path("rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n', encoding="utf-8")
    write("corpus", "rows.jsonl", "--out", "lib.mem")
    names = [source["name"] for source in show("lib.mem")["sources"]]
    assert names == [*(f"{n}.txt" for n in range(6)), "rows.jsonl:1", "rows.jsonl:2"]


@pytest.fixture
def interrupted(monkeypatch):
    """`interrupted(n)`: Ctrl-C (or another signal) arrives after n chunks of 256 tokens; `interrupted(None)`: never."""
    whole = reading.ingest

    def set_up(chunks: int | None, number: int = signal.SIGINT) -> None:
        def ingest(*args):
            for n, memory in enumerate(whole(*args, chunk=256)):
                yield memory
                if n + 1 == chunks:
                    signal.raise_signal(number)

        monkeypatch.setattr(reading, "ingest", ingest)

    return set_up


def test_ctrl_c_keeps_what_was_read_and_the_same_command_goes_on(place, interrupted, capsys):
    write(*STORIES, "--out", "whole.mem")
    before = set(files())
    for chunks, tokens, number in ((2, 512, signal.SIGINT), (3, 512 + 768, signal.SIGTERM)):
        interrupted(chunks, number)
        with pytest.raises(SystemExit) as stop:
            write(*STORIES, "--out", "lib.mem")
        assert stop.value.code == 130
        assert set(files()) - before == {"lib.mem.unfinished"}
        err = capsys.readouterr().err
        assert f"read {tokens:,} tokens, kept in lib.mem.unfinished" in err
        assert number == signal.SIGINT or "going on after 512 tokens (lib.mem.unfinished)" in err
        assert show("lib.mem.unfinished")["tokens"] == tokens
    kept = Path("lib.mem.unfinished").read_bytes()
    with pytest.raises(SystemExit) as stop:
        write(STORIES[1], STORIES[0], "--out", "lib.mem")
    assert stop.value.code == 2 and "lib.mem.unfinished has read other documents" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        write(STORIES[0], "--out", "lib.mem")
    assert "has read other documents" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        write(*STORIES, "--memory", "whole.mem", "--out", "lib.mem")
    assert "continues another memory; give the same --memory" in capsys.readouterr().err
    assert Path("lib.mem.unfinished").read_bytes() == kept and not Path("lib.mem").exists()
    interrupted(None)
    write(*STORIES, "--out", "lib.mem")
    assert set(files()) - before == {"lib.mem"}
    close("lib.mem", "whole.mem")


def test_a_pipe_gets_a_line_now_and_then(place, interrupted, monkeypatch, capsys):
    interrupted(None)
    monkeypatch.setattr("retentive.cli.progress.SECONDS", 0)
    write(*STORIES, "--out", "lib.mem")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 5 and lines[0].startswith("read 256 tokens (") and "tokens/s" in lines[0]
    assert lines[-1].startswith(f"read {show('lib.mem')['tokens']:,} tokens (100%)")
    interrupted(2)
    with pytest.raises(SystemExit):
        write(*STORIES, "--out", "new.mem")
    monkeypatch.setattr("retentive.cli.progress.SECONDS", 1000)
    interrupted(None)
    capsys.readouterr()
    write(*STORIES, "--out", "new.mem")
    assert capsys.readouterr().err == "going on after 512 tokens (new.mem.unfinished)\n"


def test_ctrl_c_before_anything_was_read_leaves_nothing(place, monkeypatch):
    monkeypatch.setattr(reading, "ingest", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    before = files()
    for more in ([], ["--separate"]):
        with pytest.raises(SystemExit) as stop:
            write(*STORIES, "--out", "lib.mem", *more)
        assert stop.value.code == 130 and files() == before


def test_going_on_that_stops_at_once_loses_nothing(place, interrupted, monkeypatch):
    interrupted(2)
    with pytest.raises(SystemExit):
        write(*STORIES, "--out", "lib.mem")
    kept = Path("lib.mem.unfinished").read_bytes()
    monkeypatch.setattr(reading, "ingest", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit):
        write(*STORIES, "--out", "lib.mem")
    assert Path("lib.mem.unfinished").read_bytes() == kept


def test_separate_documents_are_merged_as_the_files_of_each_are(place, capsys):
    write(*STORIES, "--separate", "--out", "apart.mem")
    assert "what that changed in each layer" in capsys.readouterr().out
    for n, story in enumerate(STORIES):
        write(story, "--out", f"{n}.mem")
    write(*STORIES, "--out", "whole.mem")
    parts = [f"{n}.mem" for n in range(3)]
    main(["memory", "merge", *parts, "--out", "merged.mem", "--against", "whole.mem"])
    close("merged.mem", "apart.mem")
    first, second = show("merged.mem")["errors"]
    # float32 in the first layer; above it keys and values depend on what came before
    assert first < 1e-6 < second
    assert show("apart.mem")["errors"] == pytest.approx([first, second], rel=0.2, abs=1e-6)
    main(["memory", "merge", *parts, "--chain", "--out", "chained.mem"])
    chained, whole = load_memory("chained.mem"), load_memory("whole.mem")
    torch.testing.assert_close(chained.state.memories[0].value, whole.state.memories[0].value, rtol=1e-4, atol=1e-5)
    assert int(chained.state.position[0]) == int(whole.state.position[0])
    main(["memory", "ask", "run", "--memory", "merged.mem", "--prompt", "The", *GREEDY])
    assert capsys.readouterr().out.splitlines()[-1].startswith("The")


def test_gated_memories_are_merged_without_errors_of_a_chain(place, capsys):
    config = retnet(dim=16, layers=2, heads=2, decay="gated", score_norm=False)
    save_model("gated", build(config), retentive.load("run")[1])
    main(["memory", "write", "gated", *STORIES, "--separate", "--out", "apart.mem"])
    about = show("apart.mem")
    assert about["errors"] == [] and len(about["sources"]) == 3 and about["position"] < about["tokens"]


def test_standard_input_is_a_prompt(place, monkeypatch, capsys):
    import io

    write(STORIES[0], "--out", "lib.mem")
    capsys.readouterr()
    out = []
    for argv in (["-"], ["Once"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("Once"))
        main(["memory", "ask", "run", "--memory", "lib.mem", "--prompt", *argv, *GREEDY])
        out.append(capsys.readouterr().out)
    assert out[0] == out[1] and out[0].startswith("Once")


def test_verbs_are_listed(capsys):
    main(["memory"])
    told = capsys.readouterr().out
    assert all(f"  {verb}" in told for verb in ("write", "ask", "merge", "show"))


# bad input


def other_run() -> None:
    torch.manual_seed(5)
    config = retnet(vocab_size=257, dim=32, layers=2, heads=2, decay="paper")
    save_model("other", build(config), retentive.load("run")[1])
    main(["memory", "write", "other", STORIES[0], "--out", "other.mem"])


def twin_run() -> None:
    save_model("twin", build(twin(retnet(dim=16, layers=1, heads=2))), retentive.load("run")[1])


def damage(cut: int) -> None:
    raw = bytearray(Path("lib.mem").read_bytes())
    raw[-9] ^= 4
    Path("lib.mem").write_bytes(raw[: len(raw) - cut])


def put(path: str, content: bytes) -> None:
    Path(path).write_bytes(content)


ASK = ["ask", "run", "--memory", "lib.mem", "--prompt", "The"]
MERGE = ["merge", "lib.mem", "other.mem", "--out", "new.mem"]
WRITE = ["write", "run", "--out", "new.mem"]
BAD = {
    "unknown-verb": (lambda: None, ["read"], "unknown memory verb 'read', expected one of write, ask, merge, show"),
    "no-files": (lambda: None, WRITE, "FILES is empty; name files to read"),
    "a-missing-file": (lambda: None, [*WRITE, STORIES[0], "none.txt"], "no such file or folder: none.txt"),
    "an-empty-file": (lambda: put("a.txt", b""), [*WRITE, "a.txt"], "no text in a.txt: every document is empty"),
    "a-binary-file": (lambda: put("a.txt", b"\x00\xff\x80"), [*WRITE, "a.txt"], "a.txt is not UTF-8 text"),
    "a-picture": (
        lambda: put("a.png", b"\x89PNG"),
        [*WRITE, "a.png"],
        "the model has no encoder for image",
    ),
    "taken": (lambda: None, ["write", "run", STORIES[0], "--out", "lib.mem"], "lib.mem exists: choose another file"),
    "missing-run": (lambda: shutil.rmtree("run"), [*WRITE, STORIES[0]], "no model folder at"),
    "no-tokenizer": (lambda: Path("run/tokenizer.json").unlink(), [*WRITE, STORIES[0]], "has no tokenizer.json"),
    "on-from-nothing": (lambda: None, [*WRITE, STORIES[0], "--memory", "none"], "no file at none"),
    "on-from-another": (other_run, [*WRITE, STORIES[0], "--memory", "other.mem"], "the memory of another model"),
    "separate-and-on": (
        lambda: None,
        [*WRITE, STORIES[0], "--memory", "lib.mem", "--separate"],
        "--separate and --memory exclude each other",
    ),
    "separate-for-a-transformer": (
        twin_run,
        ["write", "twin", STORIES[0], "--out", "new.mem", "--separate"],
        "memories of attention cannot be merged",
    ),
    "ask-nothing": (lambda: None, [*ASK[:-1], ""], "ask needs a prompt"),
    "ask-for-nothing": (lambda: None, [*ASK, "--max-tokens", "0"], "--max-tokens 0: must be at least 1"),
    "ask-a-missing-one": (lambda: Path("lib.mem").unlink(), ASK, "no file at lib.mem"),
    "ask-an-empty-one": (lambda: put("lib.mem", b""), ASK, "lib.mem is not a complete safetensors file"),
    "ask-a-text": (lambda: shutil.copy(STORIES[0], "lib.mem"), ASK, "is not a complete safetensors file"),
    "ask-the-weights": (lambda: shutil.copy("run/model.safetensors", "lib.mem"), ASK, "holds no saved state"),
    "ask-a-truncated-one": (lambda: damage(50), ASK, "lib.mem is not a complete safetensors file"),
    "ask-a-tampered-one": (lambda: damage(0), ASK, "lib.mem was changed after it was written"),
    "show-a-tampered-one": (lambda: damage(0), ["show", "lib.mem"], "lib.mem was changed after it was written"),
    "ask-another-model": (other_run, ["ask", "other", *ASK[2:]], "lib.mem is the memory of another model"),
    "merge-different-models": (other_run, MERGE, "memories of different models cannot be merged"),
    "merge-a-missing-one": (lambda: None, MERGE, "no file at other.mem"),
    "merge-one": (
        lambda: None,
        ["merge", "lib.mem", "--out", "new.mem"],
        "merge needs two memory files or more, got 1",
    ),
    "merge-into-one": (lambda: None, ["merge", "lib.mem", "lib.mem", "--out", "lib.mem"], "lib.mem exists"),
    "merge-against-others": (
        lambda: None,
        ["merge", "lib.mem", "lib.mem", "--out", "new.mem", "--against", "lib.mem"],
        "expected a memory of the same 2 documents",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_a_line_and_changes_nothing(case, place, capsys):
    prepare, argv, words = BAD[case]
    write(STORIES[0], "--out", "lib.mem")
    prepare()
    before = files()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["memory", *argv])
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.startswith("retentive: ") and err.count("\n") == 1 and words in err, err
    assert files() == before
