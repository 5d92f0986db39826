"""Reading in prefill chunks equals reading at once; an interrupted reading resumes, and nothing is lost."""

from pathlib import Path

import pytest
import torch

from retentive.data.tokenizer import ByteTokenizer
from retentive.infer import reading
from retentive.infer.memory import blank, head, load_memory, show
from retentive.infer.reading import Progress, ingest, write_memory
from retentive.models import build, retnet
from tests.infer.memories import MODELS, after, ids, remember


@pytest.fixture(params=MODELS)
def model(request):
    return build(MODELS[request.param]).eval()


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_reading_in_chunks_is_reading(model, chunk, same):
    tokens = ids(150)
    with torch.no_grad():
        want, _ = model(torch.tensor([[*tokens, 5, 6]]))
    seen = [m.tokens for m in ingest(model, [tokens[:40], [], tokens[40:41], tokens[41:]], blank(model), chunk=chunk)]
    assert seen == [min(n, 150) for n in range(chunk, 150 + chunk, chunk)]
    got = after(model, remember(model, tokens, chunk=chunk), [5, 6])
    same(got, want[:, -2:], 1e-4)  # float32, summed in other orders


def test_pending_tokens_are_read_first(model, same):
    memory = remember(model, ids(20))
    memory.pending = [7, 8]
    more = remember(model, [9], memory)
    assert more.tokens == 23 and more.pending == []
    same(after(model, more, [1]), after(model, remember(model, [*ids(20), 7, 8, 9]), [1]), 1e-4)


def test_a_model_of_nan_remembers_nothing(model, refuses):
    with torch.no_grad():
        model.blocks[-1].ffn.up_proj.weight.fill_(float("nan"))
    with refuses("the model's output is not finite after 7 tokens", ArithmeticError):
        list(ingest(model, [ids(20)], blank(model), chunk=7))


# documents


@pytest.fixture
def texts(tmp_path, monkeypatch) -> list[Path]:
    """Three stories of some 600 bytes; prefill chunks of 256 tokens."""
    monkeypatch.setattr(reading, "ingest", lambda *args: ingest(*args, chunk=256))
    files = [tmp_path / f"{n}.txt" for n in range(3)]
    for n, file in enumerate(files):
        file.write_text(f"The café number {n} has a view of the river.\n" * 13, encoding="utf-8")
    return files


@pytest.fixture
def reader():
    return build(retnet(vocab_size=257, dim=16, layers=2, heads=2)).eval(), ByteTokenizer()


def test_progress_goes_from_nothing_to_all(reader, texts, tmp_path):
    told: list[Progress] = []
    memory = write_memory(*reader, texts, tmp_path / "a.mem", progress=told.append)
    assert [p.tokens for p in told[:2]] == [256, 512] and told[-1].tokens == memory.tokens
    shares = [p.share for p in told]
    assert shares == sorted(shares) and 0 < shares[0] < 0.5 and shares[-1] == 1
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n', encoding="utf-8")
    told.clear()
    write_memory(*reader, [texts[0], tmp_path / "rows.jsonl"], tmp_path / "b.mem", progress=told.append)
    assert {p.share for p in told} == {None}  # how much of those lines is text is not known before


def test_progress_of_documents_read_apart(reader, texts, tmp_path):
    told: list[Progress] = []
    memory = write_memory(*reader, texts, tmp_path / "a.mem", separate=True, progress=told.append)
    assert told[-1] == (memory.tokens, 1.0) and len(told) > 2 * 3  # each document twice, in several chunks
    tokens = [p.tokens for p in told]
    assert tokens == sorted(tokens)


def test_what_a_killed_process_had_read_is_there(reader, texts, tmp_path, monkeypatch):
    """After a kill without a chance to save, reading resumes from the last periodic save."""
    whole = write_memory(*reader, texts, tmp_path / "whole.mem")
    monkeypatch.setattr(reading, "SAVE_EVERY", 0.0)

    def killed(progress: Progress) -> None:
        if progress.tokens > 1000:
            raise RuntimeError("kill -9")

    with pytest.raises(RuntimeError):
        write_memory(*reader, texts, tmp_path / "a.mem", progress=killed)
    assert head(tmp_path / "a.mem.unfinished")["tokens"] == 768
    first: list[Progress] = []
    write_memory(*reader, texts, tmp_path / "a.mem", progress=first.append)
    assert first[0].tokens > 768
    assert show(tmp_path / "a.mem")["sources"] == whole.sources and not (tmp_path / "a.mem.unfinished").exists()
    got = load_memory(tmp_path / "a.mem").state
    for x, y in zip(got.tensors(), whole.state.tensors(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)  # float32, other chunks


def test_what_is_left_out_of_a_folder_is_said(reader, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("A text.", encoding="utf-8")
    (tmp_path / "texts/a.png").write_bytes(b"no text")
    said: list[str] = []
    write_memory(*reader, [tmp_path / "texts"], tmp_path / "a.mem", say=said.append)
    assert len(said) == 1 and ".png" in said[0]


def test_errors_advise_no_options_of_other_commands(reader, tmp_path):
    """`retentive data` can skip bad text, take another field and more suffixes; reading cannot."""
    contents = {"bad.txt": b"caf\xe9", "a.jsonl": b'{"body": "x"}\n', "b.log": b"x", "c.csv": b"body\nx\n"}
    said: list[str] = []
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError) as info:
            write_memory(*reader, [tmp_path / name], tmp_path / "a.mem")
        said.append(str(info.value))
    (tmp_path / "bad.txt").write_text("good")
    (tmp_path / "a.jsonl").unlink()
    write_memory(*reader, [tmp_path], tmp_path / "b.mem", say=said.append)
    assert len(said) == 5 and "2 files of other kinds (.log .csv)" in said[-1]
    assert not [line for line in said if "--" in line or "retentive data" in line]


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_read(reader, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # whoever runs the tests may be allowed everything
    told: list[Progress] = []
    with pytest.raises(PermissionError, match=r"cannot write .*a\.mem: Permission denied"):
        write_memory(*reader, texts, tmp_path / "a.mem", progress=told.append)
    assert told == []
