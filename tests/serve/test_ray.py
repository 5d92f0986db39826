"""The server in Ray Serve, two replicas on this machine: the same answers, each conversation where its state is.

One Ray, small and without its dashboard; nothing but loopback is used.
"""

import socket
import sys
import time

import httpx
import openai
import pytest

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'retentive[ray]'")

from ray import serve as ray_serve

from retentive.serve.options import Options
from retentive.serve.ray import application, deployed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # its processes import torch, and Ray's other tests may have to end first
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]
GREEDY = {"temperature": 0, "max_tokens": 30}


@pytest.fixture
def url(runs, small_ray, tmp_path_factory):
    """Starts two replicas of the RetNet and returns their address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = Options(slots=4, states=tmp_path_factory.mktemp("states"), cache=0)
    ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
    ray_serve.run(deployed(str(runs / "retnet"), options, cpus=0.5), name="retentive")
    yield f"http://127.0.0.1:{port}"
    ray_serve.shutdown()


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def sticky(name: str) -> dict:
    """Returns a client's additions for a conversation: the session, and the header that Ray reads."""
    return {"extra_body": {"session": name}, "extra_headers": {"X-Session-Id": name}}


def chat(client, content: str, **more):
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(**{"model": "retnet", "messages": messages, **GREEDY, **more})


def answers_are_those_of_the_server_without_ray(client, retnet):
    alone = retnet.client()
    assert client.models.list().data[0].id == "retnet"
    for prompt in ("Once upon a time", "def "):
        asked = {"model": "retnet", "prompt": prompt, **GREEDY}
        assert client.completions.create(**asked).choices[0].text == alone.completions.create(**asked).choices[0].text
    said = chat(alone, "Hello").choices[0].message.content
    assert chat(client, "Hello").choices[0].message.content == said != ""
    with pytest.raises(openai.NotFoundError, match="this server has 'retnet'"):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "Hello"}])


def answers_stream(client):
    with chat(client, "Hello", stream=True, max_tokens=400) as stream:
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == chat(client, "Hello", max_tokens=400).choices[0].message.content
    assert sum(map(bool, pieces)) > 2  # what comes while one is on its way goes together


def conversations_stay_where_their_states_are(client, retnet):
    """Eight of them, in turns: one that came to another replica would have begun anew there."""
    names, alone, tokens = [f"talk-{n}" for n in range(8)], retnet.client(), {}
    for turn in ("Hello", "And then?", "Why?"):
        for name in names:
            there, here = chat(client, turn + name, **sticky(name)), chat(alone, turn + name, **sticky("ray-" + name))
            assert there.choices[0].message.content == here.choices[0].message.content
            assert there.session["tokens"] == here.session["tokens"] > tokens.get(name, 0)
            tokens[name] = there.session["tokens"]
    # names are hashed onto replicas whose places are random: eight of them may all come to one
    assert len({replica(client, f"talk-{n}") for n in range(64)}) == 2


def replica(client, name: str) -> str:
    """Which one a conversation is sent to: each began at a time of its own."""
    metrics = httpx.get(str(client.base_url.join("/metrics")), headers={"X-Session-Id": name}).text
    return next(line for line in metrics.splitlines() if line.startswith("retentive_request_seconds_created"))


def a_saved_state_is_restored_on_any_replica(client):
    chat(client, "My name is Ada.", **sticky("first"))
    http = httpx.Client(base_url=str(client.base_url), timeout=30)
    saved = http.post("states", json={"session": "first", "name": "ada"}, headers={"X-Session-Id": "first"}).json()
    answers, met = [], set()
    for n in range(64):
        if n >= 8 and len(met) == 2:
            break
        name = f"later-{n}"
        headers = {"X-Session-Id": name}
        restored = http.post("states/ada/restore", json={"session": name}, headers=headers).json()
        assert restored["tokens"] == saved["tokens"]
        answers.append(chat(client, "What is my name?", **sticky(name)).choices[0].message.content)
        met.add(replica(client, name))
    http.close()
    assert len(set(answers)) == 1 and len(met) == 2


def who_leaves_gives_the_slot_back(url):
    """Long answers, left after their first words, many more than there are slots: the last one is answered still."""
    for _ in range(20):
        body = {"prompt": "Once", "stream": True, "max_tokens": 4000, "temperature": 0}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, headers={"X-Session-Id": "leaver"}) as answer:
            assert next(answer.iter_lines()).startswith("data: ")
    end = time.monotonic() + 30
    while True:
        metrics = httpx.get(f"{url}/metrics", headers={"X-Session-Id": "leaver"}).text
        running = next(float(line.split()[1]) for line in metrics.splitlines() if line.startswith("retentive_running "))
        if running == 0:
            break
        assert time.monotonic() < end
        time.sleep(0.1)


def test_replicas_answer_as_one_server(url, client, retnet):
    """One test, since workers of pytest that shared several would start a Ray each, one after the other."""
    answers_are_those_of_the_server_without_ray(client, retnet)
    answers_stream(client)
    conversations_stay_where_their_states_are(client, retnet)
    a_saved_state_is_restored_on_any_replica(client)
    who_leaves_gives_the_slot_back(url)


WRONG = {
    "no-run": ({}, "run is missing: run=FOLDER"),
    "unknown": ({"run": "x", "replica": "2"}, "unknown arguments replica: expected run, replicas"),
    "no-number": ({"run": "x", "slots": "many"}, "slots: Input should be a valid integer"),
    "replicas": ({"run": "x", "replicas": "few"}, "Input should be a valid integer"),
    "bounds": ({"run": "x", "slots": "0"}, "`slots=0`: must be above 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_arguments_that_are_wrong(case, refuses):
    args, words = WRONG[case]
    with refuses(words):
        application(args)


def test_arguments_are_words(runs):
    made = application({"run": str(runs / "retnet"), "replicas": "3", "slots": "4", "timeout": "2.5"})
    assert isinstance(made, ray_serve.Application)
    assert made._bound_deployment.num_replicas == 3


def test_without_ray_a_line_says_what_to_install(monkeypatch, refuses):
    monkeypatch.setitem(sys.modules, "ray", None)
    with refuses("pip install 'retentive[ray]'", ImportError):
        deployed("run")
