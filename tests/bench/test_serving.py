"""`bench serving`: a gate that sees wrong tokens, counts that are right, the table of the numbers."""

import json
from contextlib import contextmanager

import pytest
import torch

from retentive import machine, native
from retentive.bench import http, serving
from retentive.bench.serving import Options
from retentive.infer.engine import Engine
from retentive.models import build, retnet, twin

CONFIG = retnet(vocab_size=257, dim=16, layers=2, heads=2)


def model(config=CONFIG):
    """Peaked enough that no two tokens are equally likely."""
    out = build(config).eval()
    for p in out.parameters():
        torch.nn.init.normal_(p, std=2 * p.shape[-1] ** -0.5) if p.ndim == 2 else None
    return out


@pytest.mark.parametrize("config", [CONFIG, twin(CONFIG)], ids=["retnet", "transformer"])
def test_a_small_run_measures_everything(config, monkeypatch):
    monkeypatch.setattr(machine, "held_memory", lambda: 7_000_000)
    result = serving.of_model(model(config), Options(streams=3, tokens=5, prompt=40, long=150, repeats=2))
    assert json.loads(json.dumps(result)) == result and "server" not in result
    assert all(0 < r["least"] <= r["median"] <= r["most"] for r in result["tokens_per_second"].values())
    gaps = result["between_tokens"]["engine"]
    assert 0 < gaps["p50"] <= gaps["p95"] <= gaps["most"]
    waits = result["first_token"]
    assert result["miss_over_hit"] == waits["miss"]["median"] / waits["hit"]["median"] > 0
    early, late = result["long_stream"]["at"]
    assert (early["tokens"], late["tokens"], late["process"]) == (100, 150, 7_000_000)
    grown = late["state"] > early["state"]
    assert grown == (config is not CONFIG), "a state does not grow, a cache does"
    shown = serving.table(result)
    assert f"{result['streams_over_one']:.2f} times one stream" in shown and "| 150 |" in shown and "7.0 MB |" in shown


@pytest.mark.skipif(native.refused(model()) is not None, reason="no library here")
def test_engines_with_the_model_in_c_are_timed_beside_that_with_torch():
    one = model()
    options = Options(streams=2, tokens=4, prompt=9, long=0, repeats=1)
    result = serving.of_model(one, options, others={"native-bf16": native.NativeModel(one)})
    assert json.loads(json.dumps(result)) == result
    times = result["native_over_engine"]["native-bf16"]
    shown = serving.table(result)
    assert times > 0 and f"{times:.2f} times the engine with torch" in shown
    assert "between two tokens of 2 streams, beside a prompt of 9" in shown and "| torch |" in shown


def test_unknown_models_and_precisions_are_refused(refuses):
    with refuses("unknown model 'native-int2', expected one of retnet, native-bf16, native-int8, native-int4"):
        serving.measure(Options(models=("retnet", "native-int2")))
    with refuses("unknown precision 'fp8'"):
        serving.measure(Options(precision="fp8"))


def test_the_server_is_measured_beside_the_engine(monkeypatch):
    """Every stream's tokens in the seconds that the client took, in turns."""
    seconds, order, given = iter([9.0, 1.0, 4.0]), [], []

    @contextmanager
    def made_up(model, tokenizer, *options):
        given.append(options)
        yield None, 99

    def through_server(port, asked):
        order.append("server")
        assert port == 99 and len(asked) == 3
        return next(seconds)

    monkeypatch.setattr(serving, "server", made_up)
    monkeypatch.setattr(http, "library_tokenizer", lambda vocab_size: None)
    monkeypatch.setattr(http, "requests", lambda model, tokenizer, prompts, tokens: [(b"", "")] * len(prompts))
    monkeypatch.setattr(http, "through_server", through_server)
    said = []
    options = Options(streams=3, tokens=10, repeats=2, server=True)
    result = serving.beside_server(model(), lambda: order.append("engine") or 60.0, options, said.append)
    assert order == ["engine", "server"] * 3 and given == [("--slots", "3", "--cache", "0", "--engine", "torch")]
    rates = {"least": 7.5, "median": 18.75, "most": 30.0}  # 30 tokens in 1 s and in 4 s
    assert result["tokens_per_second"]["server"] == rates and result["server_over_engine"] == (0.5 + 0.125) / 2
    assert said == ["engine 60 tokens/s, server 30 tokens/s", "engine 60 tokens/s, server 8 tokens/s"]


def test_the_gate_sees_tokens_of_another_stream(monkeypatch, refuses):
    def mixed(engine, row, token, *logprobs, take=Engine._take):
        take(engine, row, (token + (row == 1)) % 257, *logprobs)

    monkeypatch.setattr(Engine, "_take", mixed)
    with refuses("gave other tokens than alone: not timed", ArithmeticError):
        serving.of_model(model(), Options(streams=3, tokens=5, prompt=10, long=0, repeats=1))


def test_the_gate_has_states_of_the_dtype_that_is_timed(monkeypatch):
    dtypes = []

    def made(*args, **options):
        dtypes.append(options["state_dtype"])
        return Engine(*args, **options)

    monkeypatch.setattr(serving, "Engine", made)
    serving.gate(model(), 2, torch.int8)
    assert dtypes == [torch.int8] * 3  # of both streams together, and of each alone


def test_the_bare_step_is_the_models_own(monkeypatch):
    called, one = [], model()
    hidden = one.hidden
    monkeypatch.setattr(one, "hidden", lambda ids, state: called.append(ids.shape) or hidden(ids, state))
    serving.bare(one, 4, 6)
    assert called == [(4, 1)] * 6
