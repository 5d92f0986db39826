"""`bench edge`: a process per form, the gate, the table, and refused options."""

import json

import pytest

from benchmarks import edge
from benchmarks.edge import FORMS, Options

pytestmark = pytest.mark.slow

SMALL = {"size": "1m", "vocab_size": 257, "tokens": 70, "steps": 2, "repeats": 1, "threads": 1}


def test_each_form_in_its_own_process():
    asked = ("native-int8", "c", "c-int8", "onnx", "onnx-int4", "browser", "browser-int4")
    forms = ["torch", *(name for name in asked if not edge.missing(FORMS[name]))]
    said = []
    result = edge.measure(Options(forms=tuple(forms), **SMALL), said.append)
    assert said == ["round 1 of 1"]
    rows = {row["form"]: row for row in result["rows"]}
    assert list(rows) == [name for name in FORMS if name in forms]
    for row in rows.values():
        assert row["read_per_second"] > 0 and row["write_per_second"] > 0 and row["peak_bytes"] > 5e6
        assert 0 < row["first_seconds"] < 600
    assert rows["native-int8"]["file_bytes"] < 0.3 * rows["torch"]["file_bytes"]
    for name in ("c", "onnx"):  # no torch
        if name in rows:
            assert rows[name]["peak_bytes"] < rows["torch"]["peak_bytes"]
    assert edge.table(result).count("\n") == 1 + len(rows) and json.dumps(result)


def test_other_logits_are_not_shown():
    one = {"logits": [1.0, -2.0]}
    edge.check({"torch": [one], "onnx": [{"logits": [1.0, -2.001]}], "onnx-int8": [{"logits": [5.0, 5.0]}]})
    with pytest.raises(ArithmeticError, match=r"onnx gives logits that are off by 5\.0e-02"):
        edge.check({"torch": [one], "onnx": [{"logits": [1.0, -2.1]}]})
    with pytest.raises(ArithmeticError, match="native gives logits"):
        edge.check({"torch": [one], "native": [{"logits": [1.0, float("nan")]}]})


def test_a_process_that_fails_says_why(tmp_path):
    with pytest.raises(ChildProcessError, match=r"torch, float32 failed: .*no model folder at"):
        edge.run(FORMS["torch"], tmp_path / "none" / "model.safetensors", Options(**SMALL))


def test_what_is_missing_is_left_out(monkeypatch):
    monkeypatch.setattr(edge, "find_spec", lambda name: None)
    monkeypatch.setattr(edge, "find_compiler", lambda: None)
    told = {"logits": [1.0], "first_seconds": 1.0, "peak_bytes": 5, "read_per_second": 7.0, "write_per_second": 9.0}
    monkeypatch.setattr(edge, "run", lambda form, file, options: told)
    said = []
    result = edge.measure(Options(forms=("torch", "onnx,c,browser"), **SMALL), said.append)
    assert [row["form"] for row in result["rows"]] == ["torch"]
    absent = {"c": "a C compiler", "browser": "ziglang", "onnx": "onnx"}
    assert said[:3] == [f"without {name}: {what} is not installed" for name, what in absent.items()]


def test_an_export_that_is_not_the_model_is_left_out(monkeypatch):
    real = edge.made

    def made(form, options, folder):
        if form.kind == "native":
            raise ValueError("the logits differ")
        return real(form, options, folder)

    told = {"logits": [1.0], "first_seconds": 1.0, "peak_bytes": 5, "read_per_second": 7.0, "write_per_second": 9.0}
    monkeypatch.setattr(edge, "made", made)
    monkeypatch.setattr(edge, "run", lambda form, file, options: told)
    said = []
    result = edge.measure(Options(forms=("torch", "native"), **SMALL), said.append)
    assert [row["form"] for row in result["rows"]] == ["torch"]
    assert said == ["without native: the logits differ", "round 1 of 1"]


def test_what_is_refused(refuses):
    for changes, why in (
        ({"forms": ("onnx",)}, "torch must be among the forms"),
        ({"forms": ("torch", "tflite")}, "unknown form 'tflite'"),
        ({"steps": 0}, "`: must be at least 1"),
        ({"threads": 0}, "`threads=0`: must be at least 1"),
        ({"size": "9m"}, "9m"),
    ):
        with refuses(why):
            edge.measure(Options(**{**SMALL, "forms": ("torch",), **changes}))
