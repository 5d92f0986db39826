"""Description of a service, and the options that it refuses."""

import shutil
from contextlib import ExitStack

import pytest

from retentive.checkpoint import save_model
from retentive.data.tokenizer import ByteTokenizer
from retentive.models import build, cost, retnet, transformer, twin
from retentive.serve.completion import Completion
from retentive.serve.errors import Refused
from retentive.serve.options import Options
from retentive.serve.requests import ChatRequest
from retentive.serve.service import open_service


def test_the_info_for_the_page(server):
    info = server.http().get("/v1/info").json()
    model = server.service.model
    assert info["model"] == server.service.name and info["kind"] == model.config.name
    assert info["parameters"] == sum(p.numel() for p in model.parameters())
    assert info["state_bytes"] == model.init_state(1).nbytes and info["context"] is None and info["chat"] is False
    retains = model.config.retains
    assert info["state_bounded"] == retains
    assert info["kv_cache_bytes_per_token"] == (
        cost.cache_bytes(twin(model.config), 1, bytes_per_value=2) if retains else None
    )


def test_requests_sample_as_the_model_recommends(runs, tmp_path):
    shutil.copytree(runs / "retnet", tmp_path / "retnet")
    (tmp_path / "retnet" / "generation_config.json").write_text('{"temperature": 0.3, "top_k": 7}')
    service = open_service(tmp_path / "retnet")
    assert service.info()["sampling"] == {
        "temperature": 0.3, "top_k": 7, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0,
    }  # fmt: skip
    request = ChatRequest(messages=[{"role": "user", "content": "a"}], temperature=0.9, seed=3)
    params = Completion(service, request, "owner").params
    assert (params.temperature, params.top_k, params.seed) == (0.9, 7, 3)
    assert open_service(runs / "retnet").info()["sampling"] is None


def test_more_slots_than_there_is_memory_for_are_refused_at_the_start(runs, refuses):
    with refuses("`slots=1000000000`: they need"):
        open_service(runs / "retnet", Options(slots=10**9))


def test_slots_of_a_window_are_counted_before_they_are_filled(tmp_path, refuses):
    """A blank state has none of its window's slots yet, but the pool will have all."""
    config = transformer(vocab_size=257, dim=32, layers=1, heads=2, attention_window=2**20)
    save_model(tmp_path, build(config), ByteTokenizer())
    with refuses("`slots=100000`: they need 26,843.5 GB of states"):  # 2^20 x 2 x 32 x 4 bytes each
        open_service(tmp_path, Options(slots=10**5))


def test_completions_in_flight_are_counted_and_bounded(runs):
    service = open_service(runs / "retnet", Options(slots=1, queue=1))
    with ExitStack() as open:
        for _ in range(8):
            open.enter_context(service.admit())
        with pytest.raises(Refused, match=r"too many requests are in flight already \(8\)") as full:
            open.enter_context(service.admit())
        assert full.value.status == 429
    assert service.in_flight == 0
    service.draining = True
    with pytest.raises(Refused, match="stopping") as stopping, service.admit():
        pass
    assert stopping.value.status == 503


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path, refuses):
    """A table has rows to spare, but not most of them."""
    for vocab in (300, 4096):
        model = build(retnet(vocab_size=vocab, dim=32, layers=1, heads=2))
        save_model(tmp_path / str(vocab), model, ByteTokenizer())
    assert open_service(tmp_path / "300").tokenizer.vocab_size == 257
    with refuses("the tokenizer has 257 tokens, the model 4,096: they do not belong together"):
        open_service(tmp_path / "4096")
