"""Decoding: states filled as if read, memory by the formulas, the correctness gate, the table and the picture."""

import json

import pytest
import torch

from retentive import machine
from retentive.bench import decode
from retentive.bench.decode import Options
from retentive.bench.lab import decoders, models
from retentive.models import LanguageModel, cost, retnet, twin
from retentive.ops.ring import slots

CONFIG = retnet(vocab_size=31, dim=32, layers=2, heads=4)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def made_up(sizes, rates):
    """A tiny size, and a machine whose rates are known."""


def measured(**changes):
    how = dict(size="tiny", vocab_size=31, contexts=(8, 16), batches=(1, 3), precision="fp32", steps=2, repeats=1)
    how |= dict(models=("retnet", "transformer", "grouped"), device="cpu")
    return decode.measure(Options(**{**how, **changes}))


def test_rows_of_all_rivals():
    result = measured()
    assert json.loads(json.dumps(result)) == result
    assert [(row["batch"], row["context"]) for row in result["rows"]] == [(1, 8), (1, 16), (3, 8), (3, 16)]
    for row in result["rows"]:
        for name, found in row["models"].items():
            config, state = models.config_of(name, CONFIG), found["state_bytes"]
            held = cost.memory_bytes(config, row["context"], sequences=row["batch"])
            assert state > held if name == "retnet" else state == held
            assert found["memory_bytes"] == state + cost.weight_bytes(config)
            assert found["tokens_per_second"] == pytest.approx(row["batch"] / found["seconds"])
    assert all(n == pytest.approx(cost.parameters(CONFIG), rel=0.01) for n in result["parameters"].values())
    assert result["break_even"]["grouped"] > result["break_even"]["transformer"]


@pytest.mark.parametrize("name", ["retnet", "transformer", "grouped"])
@torch.inference_mode()
def test_a_filled_state_is_one_of_that_many_tokens(name):
    """It goes through the code that a read one does, and is as large as the formula says."""
    one = decoders.make(name, CONFIG, CPU, torch.float32)
    state = one.fill(3, 10, room=4)
    assert state.position.tolist() == [10, 10, 10]
    after = one.step(torch.zeros(3, 1, dtype=torch.int64), state)
    assert after.position.tolist() == [11, 11, 11]
    _, read = one.model.hidden(torch.zeros(3, 10, dtype=torch.int64))
    assert [x.shape for x in state.named().values()] == [x.shape for x in read.named().values()]
    held = read if one.config.attends else state
    assert held.nbytes - held.position.nbytes == one.remembers(3, 10)


def test_moves_count_weights_and_memory():
    config = twin(CONFIG)
    one = decoders.Rival("transformer", config, CPU, torch.bfloat16)
    assert one.moves(2, 100) == 2 * cost.matrix_parameters(config) + cost.cache_bytes(
        config, 100, sequences=2, bytes_per_value=2
    )
    retnet = decoders.Rival("retnet", CONFIG, CPU, torch.bfloat16)
    assert retnet.moves(2, 100) == retnet.moves(2, 10**6) > 2 * cost.matrix_parameters(CONFIG)


def test_what_does_not_fit_in_memory_is_left_out_and_said(monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda device: 50_000)
    result = measured(contexts=(8, 64), batches=(3,))
    small, large = result["rows"]
    assert "seconds" in small["models"]["retnet"] and large["models"]["transformer"] == {"skipped": "not enough memory"}
    assert "not enough memory" in decode.table(result)


def test_where_retnet_itself_does_not_fit_there_is_still_a_table(monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda device: 5_000)
    result = measured(contexts=(1,), batches=(1,))
    (row,) = result["rows"]
    assert row["models"]["retnet"] == {"skipped": "not enough memory"} and "seconds" in row["models"]["transformer"]
    assert "not enough memory" in decode.table(result)


def test_states_that_do_not_fit_together_are_measured_in_batches():
    needs = {"a": 10, "b": 60, "c": 50, "d": 200, "e": 40}

    class Needs:
        def __init__(self, need):
            self.need = need

        def remembers(self, batch, context):
            return self.need

    rivals = {name: Needs(need) for name, need in needs.items()}
    assert decode.batches_that_fit(rivals, 1, 1, 100) == ([["a", "b"], ["c", "e"]], ["d"])


def test_another_engine_takes_part_where_it_is_installed():
    pytest.importorskip("transformers")
    result = measured(models=("retnet", "llama"), contexts=(8,), batches=(2,))
    (row,) = result["rows"]
    assert row["models"]["llama"]["seconds"] > 0
    one = decoders.Llama("llama", CONFIG, CPU, torch.float32)
    with torch.inference_mode():
        cache = one.fill(2, 8, room=3)
        ids = torch.zeros(2, 1, dtype=torch.int64)
        one.step(ids, cache)
    assert cache.get_seq_length() == 9


def test_a_model_that_decodes_wrongly_is_not_timed(monkeypatch, never_timed, refuses):
    real = LanguageModel.hidden

    def wrong(self, ids, state=None, **how):
        x, state = real(self, ids, state, **how)
        return (1.1 * x if ids.shape[1] == 1 and self.config.attends else x), state

    monkeypatch.setattr(LanguageModel, "hidden", wrong)
    with refuses("Transformer decodes logits that are off by", ArithmeticError):
        measured()


def test_the_fastest_retnet_is_held_against_the_fastest_transformer():
    def row(context, **seconds):
        found = {name.replace("_", "-"): {"seconds": s} if s else {"skipped": "no room"} for name, s in seconds.items()}
        return {"batch": 1, "context": context, "models": found}

    rows = [row(512, retnet=2.0, native_int8=1.0, transformer=0.5, grouped=4.0)]
    assert decode.fastest(rows, 1) == (
        "- Batch 1, context 512: the fastest RetNet (RetNet: 2 s a step) is 0.2 times as fast as the fastest "
        "Transformer (Transformer twin: 500 ms)."
    ), "one in C is not held against Transformers in PyTorch"
    in_c = decode.fastest([row(512, retnet=2.0, native_int8=1.0, transformer=0.5, native_twin_int8=4.0)], 1)
    assert "the fastest RetNet (RetNet in C, int8: 1 s a step) is 0.5 times" in in_c
    rows += [row(2048, retnet=0.5, native_int8=1.0, transformer=9.0, grouped=4.0), row(8192, retnet=2.0, grouped=None)]
    said = "context 2,048: the fastest RetNet (RetNet: 500 ms a step) is 8.0 times as fast"
    assert said in decode.fastest(rows, 1), "the longest at which both were measured"
    assert decode.fastest(rows[2:], 1) is None and decode.fastest(rows, 8) is None


def test_the_table_and_the_picture_hold_the_rows(tmp_path, lines):
    result = measured()
    table = decode.table(result)
    heads, _, *rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and {line.count("|") for line in (heads, *rows)} == {heads.count("|")}
    assert "The float32 state with its ring is smaller than the cache of Transformer twin from" in table
    rows = [row | {"models": row["models"] | {"native-int4": row["models"]["retnet"]}} for row in result["rows"]]
    parameters = {"retnet": 1, "native-int4": 1}
    narrow = decode.table(result | {"state_precision": "int8", "parameters": parameters, "rows": rows})
    assert "| RetNet: memory | RetNet in C, int4, states int8: memory |" in narrow
    decode.plot(result, tmp_path / "a.png", title="t")
    names = {models.NAMES[name] for name in ("retnet", "transformer", "grouped")}
    assert set(lines) == names and all(len(drawn) == 3 for drawn in lines.values())
    x, y = lines["RetNet"][0]
    assert x == [8, 16] and y[0] == y[1]  # memory does not grow


@pytest.mark.parametrize(
    ("how", "shown"),
    [(dict(contexts=(8,)), ["one step at context 8 (ms)"]),
     (dict(batches=(3,)), ["memory at batch 3 (GB)", "tokens/s at batch 3"]),
     (dict(contexts=(8,), batches=(3,)), ["memory at batch 3 (GB), context 8", "one step at context 8 (ms), batch 3"])],
    ids=["batches", "contexts", "one-of-both"],
)  # fmt: skip
def test_no_panel_of_the_picture_has_a_single_point(how, shown, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(decode, "legend", lambda figure, axes: drawn.extend(axes.flat))
    decode.plot(measured(**how), tmp_path / "a.png", title="t")
    assert [axis.get_ylabel() or axis.get_xlabel() for axis in drawn] == shown  # a ranking has its label along x


def test_what_it_keeps_beside_a_neighbour_stands_in_the_file_and_under_the_table(monkeypatch):
    seconds = {"quiet_seconds": 0.006, "beside_seconds": 0.012, "kept": 0.5, "repeats": 1, "threads": 2}
    ran = []
    monkeypatch.setattr(decode.neighbour, "speed_kept", lambda run, *_, **__: ran.append(run()) or dict(seconds))
    result = measured(models=("retnet",), neighbour=True)
    per_step = {"quiet_seconds": 0.003, "beside_seconds": 0.006}  # a run is of two steps
    rows = [{"model": "retnet", "batch": batch, "context": 8, **seconds, **per_step} for batch in (1, 3)]
    assert result["neighbours"] == rows and ran == [None, None]
    said = "a step of RetNet (batch 1, context 8) keeps 50% of its speed: 6 ms instead of 3 ms (2 threads)"
    assert said in decode.table(result)
    del result["neighbours"]  # as results from before there were models in C
    assert said in decode.table(result | {"neighbour": {"batch": 1, "context": 8, **seconds, **per_step}})
    assert "neighbours" not in measured(models=("retnet",), contexts=(8,), batches=(1,))


@pytest.mark.skipif(models.missing("native-int8", CPU) is not None, reason=str(models.missing("native-int8", CPU)))
def test_models_in_c_move_as_many_bytes_as_their_weights_have(monkeypatch):
    names = ("retnet", *models.NATIVE)
    result = measured(models=names, neighbour=False)
    matrices = cost.matrix_parameters(CONFIG)
    rivals = {name: decoders.make(name, CONFIG, CPU, torch.bfloat16) for name in names}
    state = rivals["retnet"].moves(1, 8) - 2 * matrices
    for name, bits in (("bf16", 16), ("int8", 8 + 16 / 128), ("int4", 4 + 16 / 32)):
        assert rivals[f"native-{name}"].moves(1, 8) == pytest.approx(state + matrices * bits / 8)
        of_twin = rivals[f"native-twin-{name}"]
        cache = of_twin.remembers(1, 8)
        assert of_twin.moves(1, 8) == cache + cost.matrix_parameters(of_twin.config) * bits / 8
        assert of_twin.remembers(1, 1000) == 125 * cache
    hybrid = rivals["native-hybrid-int4"]
    assert hybrid.config.without_convolutions().windows == (0, 256)
    assert hybrid.remembers(1, 256) == hybrid.remembers(1, 10_000), "a window has a cache of constant size"
    assert all(name in row["models"] for row in result["rows"] for name in names)
    table = decode.table(result)
    assert "RetNet in C, int4: a step" in table


@pytest.mark.skipif(models.missing("native-int8", CPU) is not None, reason=str(models.missing("native-int8", CPU)))
@pytest.mark.parametrize(("state_precision", "bytes_of_a_row"), [("fp32", 4 * 16), ("bf16", 2 * 16), ("int8", 16 + 4)])
@torch.inference_mode()
def test_states_of_models_in_c_have_the_precision_that_was_asked_for(state_precision, bytes_of_a_row):
    """Two layers of 4 heads with states of 8 x 16; only models in C have fewer bits."""
    asked = decode.STATES[state_precision]
    of_torch, in_c = (
        decoders.make(n, CONFIG, CPU, torch.bfloat16, state_dtype=asked) for n in ("retnet", "native-int8")
    )
    dtypes = [[m.layer.state.dtype for m in one.fill(3, 10, room=4).memories] for one in (of_torch, in_c)]
    assert dtypes == [[torch.float32] * 2, [asked or torch.float32] * 2]
    saved = 3 * 2 * 4 * 8 * (4 * 16 - bytes_of_a_row)
    assert of_torch.remembers(3, 10) - in_c.remembers(3, 10) == saved
    of_weights = cost.matrix_parameters(CONFIG) * (2 - in_c.bytes_per_weight)
    fold = slots(8, 16) // 2
    assert of_torch.moves(3, 10) - in_c.moves(3, 10) == pytest.approx(of_weights + saved * (1 + 1 / fold))


@pytest.mark.skipif(models.missing("llamacpp-f16", CPU) is not None, reason=str(models.missing("llamacpp-f16", CPU)))
def test_llamacpp_decodes_what_it_is_given():
    config = retnet(vocab_size=64, dim=64, layers=2, heads=4)
    for name in models.LLAMACPP:
        one = decoders.make(name, config, CPU, torch.bfloat16)
        full = decoders.make(name, config, CPU, torch.bfloat16, full_heads=True)
        assert one.config.attention.kv_heads == 1 and full.config.attention.kv_heads == 4
        session = one.fill(3, 20, room=2)
        at = session.position
        one.step(torch.zeros(3, 1, dtype=torch.int64), session)
        assert session.position == at + 1 and session.sequences == 3
        session.close()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (dict(precision="fp8"), "unknown precision 'fp8'"),
        (dict(state_precision="int4"), "unknown `state_precision` 'int4', expected one of fp32, bf16, int8"),
        (dict(models=("retnet", "mamba")), "unknown model 'mamba'"),
        (dict(models=("transformer",)), "`models=('transformer',)`: retnet is missing"),
        (dict(repeats=0), "`repeats=0`: must be at least 1"),
        (dict(contexts=()), "`contexts=()`: must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(how, words, never_timed, refuses):
    with refuses(words):
        measured(**how)
