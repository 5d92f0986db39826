"""Several adapters of one model in one server: each answers as the merged model does, with states of its own."""

import pytest
import torch

from retentive.checkpoint import load, save_model
from retentive.checkpoint.adapter import targets_of, with_adapter
from retentive.checkpoint.weights import weights_sha256
from retentive.data.tokenizer import ByteTokenizer
from retentive.infer import SamplingParams, generate
from retentive.layers.lora import Adapter
from retentive.serve.options import Options
from retentive.serve.service import open_service
from tests.serve.asked import CHAT_IDS, GREEDY, SAID
from tests.serve.conftest import run

NAMES = ("retnet", "law", "tales")


@pytest.fixture(scope="module")
def adapters(runs, tmp_path_factory):
    """Folders of two adapters of the model "retnet", by name."""
    found = {}
    for seed, name in enumerate(NAMES[1:]):
        model = load(runs / "retnet")[0]
        how = Adapter(str(runs / "retnet"), weights_sha256(runs / "retnet"), 3, 6.0, targets_of(model, "all", 3))
        torch.manual_seed(seed)
        made = with_adapter(model, how)
        for weight, p in made.named_parameters():
            if weight.endswith("lora_b"):
                torch.nn.init.normal_(p, std=0.2)
        found[name] = tmp_path_factory.mktemp(name) / name
        save_model(found[name], made, ByteTokenizer())
    return found


@pytest.fixture(scope="module")
def several(runs, adapters, tmp_path_factory):
    options = Options(states=tmp_path_factory.mktemp("states"), slots=4)
    running = run(open_service(runs / "retnet", options, adapter=adapters))
    yield running
    running.stop()


def test_each_answers_as_the_merged_model(several, runs, adapters):
    assert [model.id for model in several.client().models.list()] == list(NAMES)
    texts = {}
    for name in NAMES:
        model, _ = load(runs / "retnet", adapter=adapters.get(name))
        tokens = generate(model, CHAT_IDS, SamplingParams(temperature=0), max_tokens=30, stop_ids=[256])
        how = dict(model=name, messages=SAID, max_tokens=30, **GREEDY)
        reply = several.client().chat.completions.create(**how)
        texts[name] = reply.choices[0].message.content
        assert texts[name] == ByteTokenizer().decode([t.id for t in tokens]).lstrip() and reply.model == name
        assert several.client().embeddings.create(model=name, input="a").model == name
        assert several.http().get("/v1/info", params={"model": name}).json()["model"] == name
    assert len(set(texts.values())) == 3


def test_states_belong_to_a_model(several):
    http = several.http()
    for name in NAMES[1:]:
        http.post("/v1/completions", json={"model": name, "prompt": "a", "session": "s", "max_tokens": 2})
    saved = http.post("/v1/states", json={"session": "s", "name": "kept", "model": "law"}).json()
    assert saved["model"] == "law"
    for name, want in (("law", ["kept"]), ("tales", []), (None, [])):
        query = {"model": name} if name else {}
        assert [each["name"] for each in http.get("/v1/states", params=query).json()["data"]] == want
    content = http.get("/v1/states/kept", params={"model": "law"}).content
    headers = {"Content-Type": "application/octet-stream"}
    assert http.put("/v1/states/new", params={"model": "tales"}, content=content, headers=headers).status_code == 409
    assert http.put("/v1/states/new", params={"model": "law"}, content=content, headers=headers).status_code == 200
    restored = http.post("/v1/states/new/restore", json={"session": "t", "model": "law"})
    assert restored.json()["tokens"] == saved["tokens"]
    assert http.delete("/v1/sessions/s").status_code == 404
    assert http.delete("/v1/sessions/s", params={"model": "tales"}).json()["deleted"]
    assert http.delete("/v1/states/kept", params={"model": "law"}).json()["deleted"]


def test_figures_are_of_all(several):
    lines = several.http().get("/metrics").text.splitlines()
    assert "retentive_slots 12.0" in lines
    assert several.http().get("/health").status_code == 200


def test_an_unknown_name(several):
    for path, how in (("/v1/states", {}), ("/v1/info", {})):
        assert several.http().get(path, params={"model": "poems"}, **how).status_code == 404
    reply = several.http().post("/v1/completions", json={"model": "poems", "prompt": "a"})
    assert reply.json()["error"]["message"] == "the model 'poems' is not here; this server has 'retnet', 'law', 'tales'"


def test_all_of_them_drain(several, runs, adapters):
    service = open_service(runs / "retnet", Options(slots=1), adapter=adapters)
    with service.adapters["law"].admit(), service.admit():
        assert service.unfinished == 2
    service.drain()
    assert all(each.draining for each in service.all)


@pytest.mark.parametrize("name", ["retnet", "a/b", ""])
def test_bad_names(name, runs, adapters, refuses):
    said = "is the model's own" if name == "retnet" else "expected letters"
    with refuses(f"`adapter='{name}'`: {said}"):
        open_service(runs / "retnet", adapter={name: adapters["law"]})


def test_slots_of_all_count(runs, adapters, refuses):
    with refuses("they need"):
        open_service(runs / "retnet", Options(slots=10**9), adapter=adapters)
