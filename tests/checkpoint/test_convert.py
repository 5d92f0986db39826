"""Conversion tensor by tensor gives the files of conversion as a whole; damage and a full disk are found before."""

import json
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file

import retentive
from retentive.checkpoint import ModelFolder, save_model
from retentive.checkpoint.convert import convert, copies, difference
from retentive.cli import main
from retentive.data.tokenizer import ByteTokenizer
from retentive.models import ARCHITECTURES, build, retnet
from tests.export.variants import ATTENDING, peaked, peaked_model

PAPER = retnet(vocab_size=257, dim=24, layers=2, heads=2, **ARCHITECTURES["torchscale"])
FLA = retnet(vocab_size=257, dim=24, layers=2, heads=2, **ARCHITECTURES["fla"])
LAYOUTS = {
    "retentive": lambda: peaked(tie_embeddings=True),
    "hf": lambda: peaked_model(ATTENDING["hybrid, window"]),
    "llama": lambda: peaked_model(ATTENDING["twin"]),
    "fla": lambda: peaked_model(FLA),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_tensor_by_tensor(layout, dtype, tmp_path, same):
    model, seen = LAYOUTS[layout]().to(dtype), []
    save_model(tmp_path / "whole", model, ByteTokenizer(), layout=layout, template="{{ messages[0].content }}")
    save_model(tmp_path / "ours", model, ByteTokenizer(), template="{{ messages[0].content }}")
    for source, to, made in (("ours", layout, "there"), ("there", "retentive", "back")):
        assert copies(ModelFolder.open(tmp_path / source), to) is not None
        convert(tmp_path / source, tmp_path / made, to, progress=lambda *now: seen.append(now))
    for made, want in (("there", "whole"), ("back", "ours")):
        have, other = (load_file(tmp_path / name / "model.safetensors") for name in (made, want))
        assert sorted(have) == sorted(other)
        same([have[name] for name in sorted(have)], [other[name] for name in sorted(have)], 0)
        for file in (tmp_path / want).iterdir():
            if file.name != "model.safetensors":
                assert (tmp_path / made / file.name).read_bytes() == file.read_bytes(), file.name
    assert seen[-1][0] == "converting" and seen[-1][1] == seen[-1][2] > 1000
    retentive.load(tmp_path / "back")  # checks the sum


def test_shards_become_one_file(tmp_path, same):
    model = peaked()
    save_model(tmp_path / "one", model, ByteTokenizer())
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    names = sorted(tensors)
    (tmp_path / "two").mkdir()
    shutil.copy(tmp_path / "one" / "config.json", tmp_path / "two")
    shards = {name: f"model-{n % 2 + 1:05}-of-00002.safetensors" for n, name in enumerate(names)}
    for file in set(shards.values()):
        save_file({name: tensors[name] for name in names if shards[name] == file}, tmp_path / "two" / file)
    (tmp_path / "two" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    convert(tmp_path / "two", tmp_path / "made")
    same(list(retentive.load(tmp_path / "made")[0].parameters()), list(model.parameters()), 0)


def test_layouts_that_compute_load_the_model_as_a_whole(tmp_path, same):
    """torchscale's files hold angles and decays beside the weights."""
    model = build(PAPER)
    save_model(tmp_path / "ours", model)
    assert copies(ModelFolder.open(tmp_path / "ours"), "torchscale") is None
    convert(tmp_path / "ours", tmp_path / "made", "torchscale")
    same(list(retentive.load(tmp_path / "made")[0].parameters()), list(model.parameters()), 0)
    mixed = load_file(tmp_path / "ours" / "model.safetensors")
    mixed["norm.weight"] = mixed["norm.weight"].bfloat16()
    save_file(mixed, tmp_path / "ours" / "model.safetensors")
    assert copies(ModelFolder.open(tmp_path / "ours"), "retentive") is None


def test_bad_input_leaves_nothing(tmp_path, refuses, monkeypatch):
    save_model(tmp_path / "ours", peaked(), ByteTokenizer())
    file = tmp_path / "ours" / "model.safetensors"
    whole = file.read_bytes()
    data = bytearray(whole)
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    with refuses("is damaged: its bytes are not those that were written"):
        convert(tmp_path / "ours", tmp_path / "made")
    file.write_bytes(whole[: len(whole) // 2])
    with refuses("is not a complete safetensors file"):
        convert(tmp_path / "ours", tmp_path / "made")
    file.write_bytes(whole)
    free = namedtuple("Usage", "total used free")(1, 1, 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda place: free)
    with refuses("No space left on device: 0 MB are free", OSError):
        convert(tmp_path / "ours", tmp_path / "made")
    monkeypatch.undo()
    tensors = load_file(file)
    del tensors["norm.weight"]
    tensors["extra"] = torch.zeros(3)
    save_file(tensors, file)
    with refuses("do not fit its config: 1 tensors missing ['norm.weight'], 1 unexpected ['extra']"):
        convert(tmp_path / "ours", tmp_path / "made")
    with refuses("ours exists: choose another folder", FileExistsError):
        convert(tmp_path / "ours", tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


def test_the_difference_from_a_reference_is_printed(parity, tmp_path, capsys, refuses):
    folder = parity / "fla-left-padding"
    reference = folder / "expected.safetensors"
    main(["convert", str(folder), str(tmp_path / "made"), "--reference", str(reference)])
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(f"largest difference of a logit from {reference}: ")
    off = difference(folder, reference)
    assert float(said.rpartition(" ")[2]) == pytest.approx(off, rel=0.05) and off < 1e-4
    with refuses("has no input_ids and no logits"):
        difference(folder, folder / "model.safetensors")
