"""Models of transformers beside ours."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that asks the hub would wait for it

import pytest

pytest.importorskip("transformers", minversion="5.16", reason="needs pip install 'retentive[hf]'")

from retentive.checkpoint import hf, save_model
from retentive.data.tokenizer import ByteTokenizer
from retentive.hf import RetentiveConfig, RetentiveForCausalLM, modeling_retentive, to_hf
from retentive.models import LanguageModel
from tests.threads import one_thread as one_thread


@pytest.fixture(params=["operator", "file"])
def computed(request, monkeypatch):
    """Retention by the package's operator, or by the file alone, as where the package is not installed."""
    if request.param == "file":
        monkeypatch.setattr(modeling_retentive, "operator", None)
    return request.param


def theirs_of(model: LanguageModel) -> RetentiveForCausalLM:
    """The same model as transformers' class."""
    theirs = RetentiveForCausalLM(RetentiveConfig(**hf.write_config(model.config))).eval()
    tensors = hf.write_tensors(dict(model.named_parameters()), model.config)
    missing, unexpected = theirs.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    return theirs


@pytest.fixture
def as_theirs():
    return theirs_of


@pytest.fixture
def exported(tmp_path):
    """`exported(model)`: its folder for transformers."""

    def make(model: LanguageModel, template: str | None = None, tokenizer=None):
        save_model(tmp_path / "model", model, tokenizer or ByteTokenizer(), template=template)
        to_hf(tmp_path / "model", tmp_path / "theirs")
        return tmp_path / "theirs"

    return make
