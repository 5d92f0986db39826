"""`bench quantization`: each measure against one computed by hand, and refused options."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks.quantization import FIRST, Options, after, agreed, distances, greedy, losses, measure, table
from retentive.checkpoint import save_model
from retentive.checkpoint.quantize import quantize
from retentive.data.pack import pack
from retentive.data.packed import Packed
from retentive.data.sources import Document
from retentive.data.tokenizer import ByteTokenizer, train_bpe
from retentive.models import build, config_of
from retentive.native.library import NotBuilt, library

HELD_OUT = "held out, and a little longer. " * 12
needs_native = pytest.mark.skipif(isinstance(library(), NotBuilt), reason=str(library()))


@pytest.fixture
def data(tmp_path):
    pack(tmp_path / "data", ByteTokenizer(), [Document("a", "text")], [Document("b", HELD_OUT)])
    return Packed(tmp_path / "data")


def model(name="retnet"):
    torch.manual_seed(0)
    return build(config_of(name, "1m", vocab_size=257, dim=64, layers=2, heads=2)).eval()


def test_first_tokens_of_a_context_are_told_apart(data):
    made = model()
    found = losses(made, data, Options(run="", data=data.path, tokens=200, length=50))
    ids = torch.from_numpy(data.first_tokens("valid", 200)).view(4, 50)
    with torch.no_grad():
        logits = made.head(made.hidden(ids)[0])
    # the last token of a window is read there and predicts the first of the next
    after_ = F.pad(ids.flatten()[1:], (0, 1))
    nats = F.cross_entropy(logits.flatten(0, 1), after_, reduction="none")[:-1].double()
    position = torch.arange(1, 51).repeat(4)[:-1]
    assert found["first"] == pytest.approx(float(nats[position < FIRST].mean()), rel=1e-5)
    assert found["others"] == pytest.approx(float(nats[position >= FIRST].mean()), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(float(nats.sum()) / math.log(2) / 200, rel=1e-5)


def test_texts_agree_up_to_the_first_other_token():
    assert agreed([1, 2, 3], [1, 2, 3]) == 3 and agreed([1, 2, 3], [1, 9, 3]) == 1 and agreed([1], [2]) == 0


def test_the_likeliest_text_is_of_the_largest_logits():
    made, ids = model(), [5, 6, 7]
    text = greedy(made, ids, 4)
    with torch.no_grad():
        logits = made.head(made.hidden(torch.tensor([ids + text]))[0])[0]
    assert logits[len(ids) - 1 : -1].argmax(-1).tolist() == text


@needs_native
@torch.no_grad()
def test_states_are_held_against_those_of_float64():
    made, ids = model(), torch.randint(257, (1, 2500))
    low, high = distances(made, ids)[::-1]
    assert 0 < high["torch"] < 1e-5 and 0 < high["native"] < 1e-5, "float32's rounding, many times over"
    assert 1e-4 < low["torch"] < 0.1 and 1e-4 < low["native"] < 0.1, "bf16 keeps 8 bits"
    rounded = copy.deepcopy(made).bfloat16()
    exact, other = after(copy.deepcopy(rounded).double(), ids), after(rounded, ids)
    assert exact[0].dtype == torch.float64 and not torch.equal(exact[0], exact[0].float().double())
    gaps = [float((x - y).norm() / y.norm()) for x, y in zip(other, exact, strict=True)]
    assert low["torch"] == max(gaps)


@needs_native
def test_a_model_is_measured_with_each_kind_of_weights(data, tmp_path):
    (tmp_path / "text.txt").write_text(HELD_OUT, encoding="utf-8")
    save_model(tmp_path / "model", model(), ByteTokenizer())
    how = {"run": str(tmp_path / "model"), "data": data.path, "tokens": 120, "length": 40, "long": 90}
    small = Options(**how, prompts=2, written=5, text=(str(tmp_path / "text.txt"),), calibration=64)
    result = measure(small)
    rows = {row["weights"]: row for row in result["rows"]}
    narrow = ["int8, activations int8", "int4, activations int8"]
    assert list(rows) == ["float32", "bf16", "int8", narrow[0], "int4", narrow[1], "int4, calibrated"]
    assert rows["float32"]["same_texts"] == 2 and rows["float32"]["same_tokens"] == 5
    sizes = [row["bytes"] for name, row in rows.items() if name not in narrow]
    assert sizes[1] * 2 == sizes[0] and sizes[1] > sizes[2] > sizes[3] == sizes[4]
    gaps = {name: abs(row["bits_per_byte"] - rows["float32"]["bits_per_byte"]) for name, row in rows.items()}
    assert 0 < gaps["int8"] < gaps["int4"] < 0.2, "int8 is nearer than int4"
    assert 0 < gaps[narrow[0]] != gaps["int8"]
    shown = table(result)
    assert "| weights | bytes | bits per byte |" in shown and "States after 90 tokens, from float64's: float32" in shown
    without = measure(Options(**how, prompts=1, written=2))
    assert len(without["rows"]) == 6 and without["calibration"] == 0


def test_what_cannot_be_measured_is_said(data, tmp_path):
    save_model(tmp_path / "twin", model("transformer"), ByteTokenizer())
    with pytest.raises(ValueError, match="this benchmark takes models of retention only, this is a Transformer"):
        measure(Options(run=str(tmp_path / "twin"), data=data.path))
    save_model(tmp_path / "int8", quantize(model(), 8), ByteTokenizer())
    with pytest.raises(ValueError, match="quantised already"):
        measure(Options(run=str(tmp_path / "int8"), data=data.path))
    with pytest.raises(ValueError, match="`prompts=0`: must be at least 1"):
        measure(Options(run=str(tmp_path / "int8"), data=data.path, prompts=0))


def test_data_of_another_tokenizer_are_refused(data, tmp_path):
    save_model(tmp_path / "model", model(), train_bpe([HELD_OUT], 257))
    with pytest.raises(ValueError, match="packed with another tokenizer"):
        measure(Options(run=str(tmp_path / "model"), data=data.path))
