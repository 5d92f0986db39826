"""Folders for onnxruntime-genai, run by it: its greedy tokens are those of the graph that they were made from."""

import numpy as np
import pytest

from retentive.checkpoint import save_model
from retentive.checkpoint.quantize import quantize
from retentive.data.tokenizer import ByteTokenizer, train_bpe
from retentive.export.folder import export
from retentive.export.onnx_run import OnnxModel
from tests.export.variants import peaked

genai = pytest.importorskip("onnxruntime_genai", reason="needs pip install onnxruntime-genai")
TEXT = "It's the 5th of 1990's days, isn't it? We'll see: naïve «été» — 東京 don't end.\n"
TOKENS = 20


@pytest.mark.parametrize("bits", [None, 4])
def test_its_tokens_are_the_graphs_own(bits, tmp_path):
    tokenizer = train_bpe([TEXT * 20], 400)
    model = peaked(vocab_size=tokenizer.vocab_size, value_dim=96)  # states that are not square
    save_model(tmp_path / "model", quantize(model, bits) if bits else model, tokenizer)
    export(str(tmp_path / "model"), "onnx", tmp_path / "onnx")
    export(str(tmp_path / "model"), "genai", tmp_path / "genai")

    with pytest.raises(ValueError, match="is a graph for onnxruntime-genai: export the model with --to onnx"):
        OnnxModel(tmp_path / "genai" / "model.onnx")
    loaded = genai.Model(str(tmp_path / "genai"))
    ids = tokenizer.encode(TEXT)
    assert genai.Tokenizer(loaded).encode(TEXT).tolist() == ids
    params = genai.GeneratorParams(loaded)
    params.set_search_options(max_length=len(ids) + TOKENS, do_sample=False)
    generator = genai.Generator(loaded, params)
    generator.append_tokens(np.array(ids, np.int32))
    while not generator.is_done():
        generator.generate_next_token()

    graph, want = OnnxModel(tmp_path / "onnx" / "model.onnx"), []
    logits = graph.read(ids)
    for _ in range(TOKENS):
        want.append(int(logits.argmax()))
        logits = graph.read(want[-1:])
    assert list(generator.get_sequence(0))[len(ids) :] == want and len(set(want)) > 5


def test_a_tokenizer_that_it_cannot_read_is_refused(tmp_path):
    save_model(tmp_path / "model", peaked(), ByteTokenizer())
    with pytest.raises(ValueError, match=r"onnxruntime-genai reads a tokenizer\.json of the tokenizers package"):
        export(str(tmp_path / "model"), "genai", tmp_path / "out")
    assert not (tmp_path / "out").exists()
