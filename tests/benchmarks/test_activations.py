"""The largest activations: of the model's own layers, and NaN where there is one."""

import pytest
import torch

from benchmarks.activations import PARTS, Options, activations, measure, table
from retentive.checkpoint import save_model
from retentive.data.pack import pack
from retentive.data.sources import Document
from retentive.data.tokenizer import ByteTokenizer
from retentive.models import build, config_of


def rows(n=2, length=12):
    return torch.randint(9, (n, 1, length)).unbind()


@pytest.mark.parametrize("name", ["retnet", "transformer", "hybrid"])
def test_each_part_is_the_largest_of_what_its_layer_hands_on(name):
    model = build(config_of(name, "1m", vocab_size=9, dim=16, layers=4, heads=2)).eval()
    texts = rows()
    found, state = activations(model, texts, "fp32")
    mixes, feeds = set(PARTS) - {"ffn"}, {"ffn", "x"}
    whole = [set(PARTS)] * 4
    assert [set(block) for block in found] == (whole if name != "hybrid" else [{"x"}, mixes, feeds] * 4)
    assert all(0 < value < 1e3 for block in found for value in block.values())
    assert (state is None) == (name == "transformer")
    with torch.no_grad():
        after = []
        for ids in texts:
            hidden = []
            hooks = [block.register_forward_hook(lambda _, x, y, to=hidden: to.append(y[0])) for block in model.blocks]
            model.hidden(ids)
            after.append([float(x.abs().max()) for x in hidden])
            for hook in hooks:
                hook.remove()
    assert [block["x"] for block in found] == [max(both) for both in zip(*after, strict=True)]


def test_what_is_not_finite_is_seen():
    model = build(config_of("retnet", "1m", vocab_size=9, dim=16, layers=2, heads=2)).eval()
    with torch.no_grad():
        model.blocks[1].retention.v_proj.weight[0, 0] = torch.nan
    (first, second), state = activations(model, rows(), "fp32")
    assert first["o"] < 1e3 and second["v"] != second["v"] and second["x"] != second["x"] and state != state


def test_a_model_is_measured_on_held_out_text(tmp_path):
    data = tmp_path / "data"
    pack(data, ByteTokenizer(), [Document("a", "text")], [Document("b", "held out " * 20)])
    save_model(tmp_path / "model", build(config_of("retnet", "1m", vocab_size=257, dim=16, layers=2, heads=2)))
    result = measure(Options(run=tmp_path / "model", data=data, tokens=100, length=40))
    assert result["tokens"] == 100 and len(result["blocks"]) == 2
    shown = table(result)
    assert (
        "| block | q | k | v | o | out | ffn | x |" in shown and "Largest magnitudes over 100 tokens in bf16" in shown
    )
    with pytest.raises(ValueError, match="unknown precision 'fp8'"):
        measure(Options(run=tmp_path / "model", data=data, precision="fp8"))
    with pytest.raises(ValueError, match="`tokens=0`: must be at least 1"):
        measure(Options(run=tmp_path / "model", data=data, tokens=0))
