"""Programs for ExecuTorch: the step beside the model in every variant, then the program itself by its runtime."""

import copy
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from retentive.checkpoint import save_model
from retentive.checkpoint.quantize import quantize
from retentive.cli import main
from retentive.data.tokenizer import ByteTokenizer
from retentive.export.executorch import LEVELS, TURNS, Step, check_exportable
from retentive.models import build, retnet, twin
from retentive.models.encoders import AudioConfig, with_encoders
from retentive.ops import rotary
from tests.export.variants import TINY, VARIANTS, peaked

pytestmark = pytest.mark.slow

needs_runtime = pytest.mark.skipif(not find_spec("executorch"), reason="needs pip install 'retentive[executorch]'")


@pytest.mark.parametrize("multiple", [1, 32])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_the_step_is_the_models(changes, multiple):
    model = peaked(**changes)
    step, ids = Step(model, multiple), torch.randint(257, (1, 30))
    V = model.config.retention.head_shape[2]
    if multiple == 32:  # matrices whose rows divide into groups
        assert all(m.in_features % 32 == 0 for m in step.modules() if isinstance(m, torch.nn.Linear))
    want, states = copy.deepcopy(model).double()(ids)[0][0], step.blank()
    assert states[0].shape[-1] >= V
    for t in range(30):
        logits, *states = step(ids[0, t : t + 1], torch.tensor([t]), *states)
        # float32, and a decay by the log of a sigmoid
        torch.testing.assert_close(logits[0].double(), want[t], rtol=0, atol=2e-5 * float(want.abs().max()))


def test_phases_of_far_positions():
    step = Step(peaked())
    for position in (0, 255, 256, 1_000_003, TURNS**LEVELS - 1):
        cos, sin = step.phases(torch.tensor([position]))
        want = rotary.phases(torch.tensor([position]), 32, "interleaved", dtype=torch.float64)
        torch.testing.assert_close(torch.stack([cos, sin]).double(), torch.stack(want), rtol=0, atol=1e-6)


def test_what_is_refused(tmp_path, monkeypatch, capsys, refuses):
    with refuses("an export takes models of retention only, this is a Transformer"):
        check_exportable(build(twin(retnet(**TINY))))
    with refuses("sees or hears is not exported"):
        check_exportable(with_encoders(peaked(), {"audio": AudioConfig(token=257)}))
    with refuses("ExecuTorch rounds by itself"):
        check_exportable(quantize(peaked(), 8, 32))
    monkeypatch.chdir(tmp_path)
    save_model("run", peaked(), ByteTokenizer())
    with pytest.raises(SystemExit):
        main(["export", "run", "--to", "executorch", "--out", "no", "--standard"])
    assert "--standard is of --to onnx" in capsys.readouterr().err and not Path("no").exists()


PROGRAM = """
import contextlib, io
from pathlib import Path
import numpy as np, torch
from retentive.checkpoint import load
from retentive.cli import main
from retentive.export.executorch_run import ExecutorchModel

def said(*argv, code=0):
    out, err, found = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(argv))
        except SystemExit as end:
            found = end.code or 0
    assert found == code, err.getvalue()
    return out.getvalue(), err.getvalue()

assert "logits are off by" in said("export", "run", "--to", "executorch", "--out", "made")[1]
model = load("run")[0]
ids = np.random.default_rng(0).integers(0, 257, 40).tolist()
with torch.no_grad():
    want = model(torch.tensor([ids]))[0][0, -1].numpy()
program = ExecutorchModel("made/model.pte")
program.read(ids[:20])
kept, position = program.states, program.position
program.read([1, 2, 3])  # goes elsewhere
program.resume(kept, position)
got = program.read(ids[20:])
np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())
for wrong in ([], [257]):
    try:
        program.read(wrong)
    except ValueError as error:
        assert "ids must be of the vocabulary" in str(error)
    else:
        raise AssertionError(wrong)
with open("made/model.pte", "rb") as file:
    assert file.read().count(b"XnnpackBackend") == 1  # one delegate

ask = ["--prompt", "It", "--temperature", "0", "--max-tokens", "20"]
text = said("generate", "run", *ask)[0]
assert len(text) > 3 and said("generate", "made/model.pte", *ask)[0] == text
said("export", "run", "--to", "executorch", "--out", "small", "--weights", "int4")
assert len(said("generate", "small/model.pte", *ask)[0]) > 3
Path("text.pte").write_text("no program")
assert "text.pte is no program" in said("generate", "text.pte", code=2)[1]
wrong = said("export", "narrow", "--to", "executorch", "--out", "no", "--weights", "int4", code=2)[1]
assert "groups of 32, which dim 48 is no multiple of" in wrong
"""


@needs_runtime
def test_the_program_by_its_own_runtime(tmp_path):
    save_model(tmp_path / "run", peaked(), ByteTokenizer())
    save_model(tmp_path / "narrow", peaked(dim=48), ByteTokenizer())
    # in a process of its own: its library says things on stderr, and warns
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sizes = [(tmp_path / name / "model.pte").stat().st_size for name in ("made", "small")]
    embedding = 257 * 64 * 4  # stays in floats
    assert sizes[1] - embedding < 0.6 * (sizes[0] - embedding)
    assert not (tmp_path / "no").exists()
    assert sorted(p.name for p in (tmp_path / "made").iterdir()) == ["model.pte", "tokenizer.json"]
