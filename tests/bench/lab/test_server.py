"""The server process of the benches: what it says when it does not start. (Its work: test_http.py, test_soak.py.)"""

import sys

import pytest
import torch

from retentive.bench.lab.server import server
from retentive.data.tokenizer import ByteTokenizer
from retentive.models import build, retnet


def test_no_server_is_said_in_one_line(monkeypatch, tmp_path, refuses):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = build(retnet(vocab_size=257, dim=16, layers=1, heads=2))
    with refuses("the server did not start", OSError), server(model, ByteTokenizer()):
        pytest.fail("there is none")
    assert not list(tmp_path.iterdir()), "its folder is gone"
    assert torch.get_num_threads() == 1
