"""Options that benches share: names with commas, devices."""

import torch

from retentive.bench.lab.options import OnDevice, Sized, words
from retentive.models import retnet


def test_names_may_have_commas_between_them():
    assert words(("a,b", "c", ",")) == ["a", "b", "c"]


def test_a_device_is_a_cpu_or_an_nvidia_gpu(monkeypatch, refuses):
    assert OnDevice(device="cpu").torch_device == torch.device("cpu")
    assert OnDevice().torch_device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    with refuses("unknown device 'tpu'"):
        _ = OnDevice(device="tpu").torch_device
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with refuses("`device='mps'`: benches run on cpu and cuda only"):
        _ = OnDevice(device="mps").torch_device


def test_a_size_is_a_config(refuses):
    assert Sized(size="1m", vocab_size=31).config == retnet("1m", vocab_size=31)
    with refuses("unknown size '3m'"):
        _ = Sized(size="3m").config
