"""The models beside the RetNet, and the correctness gates of whole models."""

import pytest
import torch

from retentive.bench.lab import models
from retentive.models import LanguageModel, build, cost, retnet

CONFIG = retnet(vocab_size=31, dim=32, layers=2, heads=4)


@pytest.mark.parametrize(("config", "kv_heads"), [(CONFIG, 1), (retnet(dim=80, heads=10), 2)])
def test_grouped_heads_are_a_quarter_or_what_divides(config, kv_heads):
    grouped = models.config_of("grouped", config)
    assert grouped.attention.kv_heads == kv_heads
    assert cost.parameters(grouped) == pytest.approx(cost.parameters(config), rel=0.01)


def test_names_come_in_one_order_and_retnet_is_among_them(refuses, monkeypatch):
    cpu, said = torch.device("cpu"), []
    assert models.chosen(["transformer,retnet"], models.NAMES, cpu, said.append) == ["retnet", "transformer"]
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    names = ["retnet", "llama", "llamacpp-q8_0"]
    assert models.chosen(names, models.NAMES, cpu, said.append) == ["retnet"]
    assert said == ["without llama: transformers is not installed", "without llamacpp-q8_0: llama_cpp is not installed"]
    assert models.missing("native-int4", torch.device("cuda")) == "it runs on the CPU"
    with refuses("unknown model 'mamba', expected one of retnet, transformer"):
        models.chosen(["retnet", "mamba"], models.NAMES, cpu, said.append)
    with refuses("unknown model 'llama', expected one of retnet, grouped"):
        models.chosen(["retnet", "llama"], ["retnet", "grouped"], cpu, said.append)
    with refuses("retnet is missing, with which all others are compared"):
        models.chosen(["transformer"], models.NAMES, cpu, said.append)


def test_a_model_is_the_same_every_time():
    one, two = (models.make("retnet", CONFIG, torch.device("cpu"), torch.bfloat16) for _ in range(2))
    assert one.head.weight.dtype == torch.bfloat16 and torch.equal(one.head.weight, two.head.weight)


def test_forms_and_decoding_that_agree_pass_with_their_difference():
    # the gate's own bound; float32 sums of 40 tokens differ by 1e-6
    assert 0 < models.check_forms(build(CONFIG), 40) < models.TOLERANCE
    assert 0 < models.check_decoding(build(CONFIG)) < models.TOLERANCE


def test_narrow_states_need_a_model_that_has_them(refuses):
    models.check_states("int8", ["retnet", "native-hybrid-int4"])
    models.check_states("fp32", ["retnet"])
    with refuses("`state_precision='bf16'`: only models in C have such states, add one of native-bf16"):
        models.check_states("bf16", ["retnet,native-twin-int8,llamacpp-f16"])


def test_decoding_is_checked_with_states_of_the_dtype_that_is_timed():
    """Rounding to 127 steps moves a number more than rounding to bf16 does, and that more than float32 sums do."""
    model = build(CONFIG)
    off = [models.check_decoding(model, state_dtype=dtype) for dtype in (None, torch.bfloat16, torch.int8)]
    assert off[0] < models.TOLERANCE < off[1] < off[2]


def test_decoding_in_bf16_may_be_off_by_its_rounding_and_no_more(monkeypatch, refuses):
    model = models.make("retnet", CONFIG, torch.device("cpu"), torch.bfloat16)
    assert models.check_decoding(model) > 0
    real = LanguageModel.hidden

    def wrong(self, ids, state=None, **how):
        x, state = real(self, ids, state, **how)
        return (2 * x if ids.shape[1] == 1 else x), state

    monkeypatch.setattr(LanguageModel, "hidden", wrong)
    with refuses("RetNet decodes logits that are off by", ArithmeticError):
        models.check_decoding(model)
