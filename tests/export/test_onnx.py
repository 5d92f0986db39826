"""ONNX graphs beside the model they came from: logits and states, every variant, tokens, and what is refused."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("onnx", reason="graphs are written by pip install 'retentive[onnx]'")
pytest.importorskip("onnxruntime", reason="graphs are run by pip install 'retentive[onnx]'")

from retentive.checkpoint import save_model
from retentive.checkpoint.quantize import quantize
from retentive.cli import main
from retentive.data.tokenizer import ByteTokenizer, train_bpe
from retentive.export.onnx import export_onnx
from retentive.export.onnx_run import OnnxModel
from retentive.export.writing import generate, pick
from retentive.infer import generate as torch_generate
from retentive.models import transformer
from retentive.models.encoders import AudioConfig, with_encoders
from retentive.sampling import SamplingParams
from tests.configs import on_levels
from tests.export.variants import ATTENDING, TINY, VARIANTS, peaked, peaked_model


def exported(model, tmp_path, **how) -> OnnxModel:
    export_onnx(model, tmp_path / "model.onnx", eos=256, **how)
    return OnnxModel(tmp_path / "model.onnx", threads=1)


@pytest.mark.parametrize("standard", [False, True], ids=["own", "standard"])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_and_states_are_the_models(changes, standard, tmp_path):
    model = peaked(**changes)
    graph = exported(model, tmp_path, standard=standard)
    assert graph.in_place
    wide, state = model.double(), None  # the oracle
    ids = np.random.default_rng(0).integers(0, 257, 60).tolist()
    with torch.no_grad():
        for begin, end in ((0, 40), (40, 41), (41, 42), (42, 59), (59, 60)):
            logits, state = wide(torch.tensor([ids[begin:end]]), state)
            got = graph.read(ids[begin:end])
            # float32 through a few layers; the runtime's approximations of exp and erf are of some 1e-6
            np.testing.assert_allclose(got, logits[0, -1], rtol=0, atol=2e-5 * float(logits.abs().max()))
    for name, got in graph.states.items():
        want = memory_of(state, name).numpy()
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


def memory_of(state, name: str) -> torch.Tensor:
    """Memory of retention or of a convolution as the graph has it under this name."""
    kind, i = name.split(".")
    memory = state.memories[int(i)]
    return memory.tensor() if kind == "state" else memory.rows.mT


@pytest.mark.parametrize("standard", [False, True], ids=["own", "standard"])
@pytest.mark.parametrize("name", ATTENDING)
def test_attention_is_the_models(name, standard, tmp_path, monkeypatch):
    """Parts of the text that a window, its ring and the caches' growth end within."""
    monkeypatch.setattr("retentive.export.onnx_run.SLOTS", 16)
    model = peaked_model(ATTENDING[name])
    graph = exported(model, tmp_path, standard=standard)
    assert graph.in_place
    wide, state = model.double(), None
    ids = np.random.default_rng(0).integers(0, 257, 100).tolist()
    with torch.no_grad():
        for begin, end in ((0, 40), *((n, n + 1) for n in range(40, 70)), (70, 74), (74, 99), (99, 100)):
            logits, state = wide(torch.tensor([ids[begin:end]]), state)
            got = graph.read(ids[begin:end])
            np.testing.assert_allclose(got, logits[0, -1], rtol=0, atol=2e-5 * float(logits.abs().max()))
    for name, got in graph.states.items():
        kind, i = name.split(".")
        memory, window = state.memories[int(i)], model.config.windows[int(i)]
        if kind in ("state", "rows"):
            want = memory_of(state, name).numpy()
        else:  # the tokens in view, wherever they lie
            held = np.arange(100 - (window or 100), 100)
            got, slots = got[:, :, held % got.shape[2] if window else held], getattr(memory, kind)
            want = slots[:, held % slots.shape[1]].transpose(1, 2).numpy()
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_a_graph_of_the_first_format_is_read(tmp_path):
    import onnx

    exported(peaked(), tmp_path)
    graph = onnx.load(tmp_path / "model.onnx")
    said = {p.key: p.value for p in graph.metadata_props if p.key != "windows"}
    del graph.metadata_props[:]
    onnx.helper.set_model_props(graph, said | {"format": "retentive-onnx-1"})
    onnx.save(graph, tmp_path / "first.onnx")
    ids = [3, 1, 4, 1, 5]
    np.testing.assert_array_equal(OnnxModel(tmp_path / "first.onnx").read(ids), exported(peaked(), tmp_path).read(ids))


def test_far_positions_keep_their_phases(tmp_path):
    model = peaked()
    graph = exported(model, tmp_path)
    model = model.double()
    state = model.init_state(1)
    state.position.fill_(3_000_000)
    graph.resume(graph.states, 3_000_000)
    with torch.no_grad():
        want = model(torch.tensor([[5, 6, 7]]), state)[0][0, -1]
    np.testing.assert_allclose(graph.read([5, 6, 7]), want, rtol=0, atol=2e-5 * float(want.abs().max()))


@pytest.mark.parametrize(
    "changes", [{}, {"tie_embeddings": True}, {"dim": 72, "heads": 3, "decay_bias": True}, {"convolution": 4}]
)
@pytest.mark.parametrize("bits", [8, 4])
def test_integers_go_in_as_they_are(bits, changes, tmp_path):
    model = quantize(on_levels(peaked(**changes)), bits, 16 if bits == 8 else 32, dtype=torch.float32)
    ids = np.random.default_rng(0).integers(0, 257, 50).tolist()
    with torch.no_grad():
        want = model(torch.tensor([ids]))[0][0, -1].numpy()
    # standard operators multiply floats, as torch does here: equal to rounding
    got = exported(model, tmp_path, standard=True).read(ids)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())
    # onnxruntime's own round what comes in to 8 bits as well
    got = exported(model, tmp_path).read(ids)
    assert np.sqrt(((got - want) ** 2).mean()) < 0.05 * want.std()


def test_tied_weights_are_in_the_file_once(tmp_path):
    sizes = {}
    for bits in (32, 8, 4):
        model = peaked(tie_embeddings=True, vocab_size=4096)
        model = model if bits == 32 else quantize(model, bits, 32)
        export_onnx(model, tmp_path / "model.onnx", eos=0)
        sizes[bits] = (tmp_path / "model.onnx").stat().st_size
        stored = sum(x.numel() * x.element_size() for x in model.state_dict().values())
        assert sizes[bits] < stored + 4096 * 64 * bits // 16  # half of the table more, at most


def test_more_weights_than_one_file_takes(tmp_path, monkeypatch):
    monkeypatch.setattr("retentive.export.onnx.LARGEST", 1000)
    model = peaked()
    graph = exported(model, tmp_path)
    assert (tmp_path / "model.onnx").stat().st_size < 50_000 < (tmp_path / "model.onnx.data").stat().st_size
    with torch.no_grad():
        want = model(torch.tensor([[1, 2]]))[0][0, -1].numpy()
    np.testing.assert_allclose(graph.read([1, 2]), want, rtol=0, atol=1e-4)


def test_batches(tmp_path):
    import onnxruntime

    model = peaked()
    export_onnx(model, tmp_path / "model.onnx", eos=256)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    ids, position = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([0, 700])
    state = model.init_state(2)
    state.position = position.clone()
    given = {f"state.{i}": memory.tensor().numpy() for i, memory in enumerate(state.memories)}
    got = session.run(["logits"], {"input_ids": ids.numpy(), "position": position.numpy(), **given})[0]
    with torch.no_grad():
        want = model(ids, state)[0][:, -1].numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["forget gate, window", "hybrid", "hybrid, window, convolution"])
def test_rows_of_a_batch_attend_to_their_own_texts(name, tmp_path):
    import onnxruntime

    graph, texts, more = exported(peaked_model(ATTENDING[name]), tmp_path), ([7], list(range(20))), [1, 2, 3]
    states, want = [], []
    for text in texts:
        graph.reset()
        graph.read(text)
        states.append(graph.states)
        want.append(graph.read(more))
    longest = max(map(len, texts)) + len(more)
    given = {}
    for key, one in states[0].items():
        rows = [one, states[1][key]]
        if not key.startswith("state.") and "window" not in name:  # free slots after those in use
            rows = [np.pad(x, [(0, 0), (0, 0), (0, longest - x.shape[2]), (0, 0)]) for x in rows]
        given[key] = np.concatenate(rows)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    ids, position = np.array([more, more]), np.array([len(text) for text in texts])
    got = session.run(["logits"], {"input_ids": ids, "position": position, **given})[0]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("bits", [8, 4])
def test_integers_of_attention_go_in_as_they_are(bits, tmp_path, monkeypatch):
    monkeypatch.setattr("retentive.checkpoint.quantize.check_quantizable", lambda model: None)
    model = quantize(peaked_model(ATTENDING["forget gate"]), bits, dtype=torch.float32)
    ids = np.random.default_rng(0).integers(0, 257, 50).tolist()
    with torch.no_grad():
        want = model(torch.tensor([ids]))[0][0, -1].numpy()
    got = exported(model, tmp_path, standard=True).read(ids)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())
    got = exported(model, tmp_path).read(ids)
    assert np.sqrt(((got - want) ** 2).mean()) < 0.05 * want.std()


@pytest.mark.parametrize("name", ["window", "hybrid", "hybrid, window, convolution"])
def test_texts_go_on_from_kept_caches(name, tmp_path):
    model, greedy = peaked_model(ATTENDING[name]), SamplingParams(temperature=0)
    graph = exported(model, tmp_path)
    want = [t.id for t in torch_generate(model, [256, 7, 8], greedy, max_tokens=40, stop_ids=[256])]
    assert list(generate(graph, [256, 7, 8], greedy, max_tokens=40)) == want
    graph.reset()
    graph.read([256, 7])
    kept, position = graph.states, graph.position
    graph.read([1, 2, 3])
    for _ in range(2):
        graph.resume(kept, position)
        assert list(generate(graph, [8], greedy, max_tokens=40)) == want


def test_tokens_are_those_of_torch(tmp_path):
    model = peaked()
    graph, greedy = exported(model, tmp_path), SamplingParams(temperature=0)
    want = [t.id for t in torch_generate(model, [256, 7, 8], greedy, max_tokens=40, stop_ids=[256])]
    assert list(generate(graph, [256, 7, 8], greedy, max_tokens=40)) == want
    # and on from a state that was kept
    graph.reset()
    logits = graph.read([256, 7])
    kept, position, before = graph.states, graph.position, logits.copy()
    graph.read([1, 2, 3])
    np.testing.assert_array_equal(logits, before)  # the call after wrote its own
    for _ in range(2):  # what was kept stays as it was
        graph.resume(kept, position)
        assert list(generate(graph, [8], greedy, max_tokens=40)) == want


def test_where_states_must_not_be_written_in_place(tmp_path, monkeypatch):
    model = peaked()
    wanted = list(generate(exported(model, tmp_path), [1], SamplingParams(temperature=0), max_tokens=20))
    call = OnnxModel._call

    def wrong(self, ids):
        """A runtime that writes the new state before it has read the old one."""
        if self.in_place:
            for value in self._states.values():
                value.update_inplace(np.ones(value.shape(), np.float32))
        return call(self, ids)

    monkeypatch.setattr(OnnxModel, "_call", wrong)
    graph = OnnxModel(tmp_path / "model.onnx")
    assert not graph.in_place
    assert list(generate(graph, [1], SamplingParams(temperature=0), max_tokens=20)) == wanted


def test_picking():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    random = np.random.default_rng(0)

    def drawn(**how) -> list[float]:
        found = [pick(logits, SamplingParams(**how), random, {0}) for _ in range(4000)]
        return [found.count(n) / 4000 for n in range(4)]

    assert drawn(temperature=0) == [1, 0, 0, 0]
    assert drawn() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.04)  # five standard errors
    assert drawn(top_k=2) == pytest.approx([5 / 8, 3 / 8, 0, 0], abs=0.04)
    assert drawn(top_p=0.6) == pytest.approx([5 / 8, 3 / 8, 0, 0], abs=0.04)
    assert drawn(min_p=0.25) == pytest.approx([50 / 95, 30 / 95, 15 / 95, 0], abs=0.04)
    assert drawn(temperature=0.5) == pytest.approx(np.array([25, 9, 2.25, 0.25]) / 36.5, abs=0.04)
    assert drawn(temperature=0, bias={0: -100.0}) == [0, 1, 0, 0]
    assert drawn(temperature=0, repetition_penalty=3.0) == [0, 1, 0, 0]  # log 0.5 times three is below log 0.3
    with pytest.raises(ArithmeticError, match="not finite"):
        pick(np.array([np.nan, 1], np.float32), SamplingParams(), random, set())


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "run", peaked(), ByteTokenizer())
    return tmp_path


def test_the_command_and_a_process_without_torch(place, capsys):
    main(["export", "run", "--to", "onnx", "--out", "made"])
    assert "the next token's logits differ from torch's by " in capsys.readouterr().err
    assert sorted(file.name for file in (place / "made").iterdir()) == ["model.onnx", "tokenizer.json"]
    main(["generate", "run", "--prompt", "It", "--temperature", "0", "--max-tokens", "20"])
    want = capsys.readouterr().out
    program = """
import sys

class Absent:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "torch":
            raise ImportError("there is no torch here")

sys.meta_path.insert(0, Absent())
from retentive.cli import main
main(sys.argv[1:])
"""
    ask = ["generate", "made/model.onnx", "--prompt", "It", "--temperature", "0", "--max-tokens", "20"]
    done = subprocess.run([sys.executable, "-c", program, *ask], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, want, "")
    main(["export", "run", "--to", "onnx", "--out", "small", "--weights", "int4"])
    assert (place / "small/model.onnx").stat().st_size < 0.3 * (place / "made/model.onnx").stat().st_size
    main(["generate", "small/model.onnx", "--max-tokens", "5", "--seed", "1"])
    assert len(capsys.readouterr().out) > 1
    train_bpe(["of another model " * 50], 300).save(place / "small")
    with pytest.raises(SystemExit) as stop:
        main(["generate", "small/model.onnx"])
    assert stop.value.code == 2 and "they do not belong together" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["twin", "hybrid, window", "hybrid, window, convolution"])
def test_models_that_attend_by_the_command(name, place, capsys):
    save_model("attends", peaked_model(ATTENDING[name]), ByteTokenizer())
    ask = ["--prompt", "It", "--temperature", "0", "--max-tokens", "40"]
    main(["generate", "attends", *ask])
    want = capsys.readouterr().out
    main(["export", "attends", "--to", "onnx", "--out", "made"])
    assert "the next token's logits differ from torch's by " in capsys.readouterr().err
    main(["generate", "made/model.onnx", *ask])
    assert capsys.readouterr().out == want


def test_what_is_refused(place, capsys, refuses):
    def fails(*argv: str) -> str:
        with pytest.raises(SystemExit):
            main(list(argv))
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1
        return said.err

    (place / "taken").mkdir()
    assert "taken exists" in fails("export", "run", "--to", "onnx", "--out", "taken")
    save_model("hearing", with_encoders(peaked(), {"audio": AudioConfig(token=257)}), ByteTokenizer())
    assert "sees or hears cannot be exported" in fails("export", "hearing", "--to", "onnx", "--out", "no")
    save_model("sinks", peaked_model(transformer(**TINY, attention_window=4, attention_sinks=1)), ByteTokenizer())
    assert "with attention sinks has no ONNX graph" in fails("export", "sinks", "--to", "onnx", "--out", "no")
    save_model("odd", quantize(peaked(), 8, 48), ByteTokenizer())
    assert "a group of 48 integers" in fails("export", "odd", "--to", "onnx", "--out", "no")
    assert not (place / "no").exists() and not list(place.glob(".no*"))
    assert "no file at none.onnx" in fails("generate", "none.onnx")
    (place / "text.onnx").write_text("no graph")
    assert "cannot run text.onnx" in fails("generate", "text.onnx")
    main(["export", "run", "--to", "onnx", "--out", "made"])
    capsys.readouterr()
    assert "--max-tokens must be at least 1" in fails("generate", "made/model.onnx", "--max-tokens", "0")
    (place / "made/tokenizer.json").unlink()
    assert "no tokenizer at made" in fails("generate", "made/model.onnx")
    graph = OnnxModel("made/model.onnx")
    for ids in ([], [257], [-1]):
        with refuses("expected at least one id, each from 0 to"):
            graph.read(ids)
    with refuses("expected token ids from 0 to 256, got [300]"):
        list(generate(graph, [1], SamplingParams(bias={300: 1.0}), max_tokens=1))
    import onnx

    other = onnx.load("made/model.onnx")
    onnx.helper.set_model_props(other, {"format": "another"})
    onnx.save(other, "made/other.onnx")
    with refuses("not a graph of `retentive export`; write one with `to='onnx'`"):
        OnnxModel("made/other.onnx")
    assert json.loads(graph.session.get_modelmeta().custom_metadata_map["config"])["dim"] == 64
