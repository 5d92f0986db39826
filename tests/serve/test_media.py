"""Pictures and sound over HTTP: the answer is that of the model alone; sessions remember; what is wrong is named."""

import base64
import io
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the server needs pip install 'retentive[serve]'")
pytest.importorskip("PIL", reason="pictures need pip install 'retentive[multimodal]'")
pytest.importorskip("soundfile", reason="sound needs pip install 'retentive[multimodal]'")
pytest.importorskip("soxr", reason="sound needs pip install 'retentive[multimodal]'")

import httpx
import openai
import soundfile
from PIL import Image

from retentive.data.media import rows_of
from retentive.data.tokenizer import ByteTokenizer
from retentive.infer import SamplingParams, generate
from retentive.models.encoders import encoders_of
from retentive.multimodal.prepare import Opener
from retentive.serve import media

GREEDY = {"temperature": 0, "max_tokens": 9}


@pytest.fixture
def server(eyes):
    return eyes


def picture(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8), np.uint8)).save(out, "PNG")
    return out.getvalue()


def sound(hertz: float, seconds: float = 0.1) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.sin(2 * np.pi * hertz * np.arange(8000 * seconds) / 8000), 8000, format="WAV")
    return out.getvalue()


def seen(raw: bytes) -> dict:
    url = "data:image/png;base64," + base64.b64encode(raw).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def heard(raw: bytes) -> dict:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(raw).decode(), "format": "wav"}}


def asked(content: str | list) -> dict:
    return {"messages": [{"role": "user", "content": content}], **GREEDY}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def alone(server, *contents, state=None) -> tuple[str, int]:
    """(what the model says by itself after these contents of messages, in turns; tokens read)."""
    model, template = server.service.model, server.service.template
    rows = Opener({kind: encoder.config for kind, encoder in encoders_of(model).items()}).rows
    made = [
        {"role": ("user", "assistant")[n % 2], "content": content if isinstance(content, str) else
         [each if isinstance(each, str) else rows(*each) for each in content]}
        for n, content in enumerate(contents)
    ]  # fmt: skip
    ids = template.first(made)
    found = generate(model, ids, SamplingParams(temperature=0), rows=rows_of(made), max_tokens=9, stop_ids=[256])
    return ByteTokenizer().decode([token.id for token in found]), len(ids)


def test_a_picture_and_a_clip_through_openais_client(server):
    ask = server.client().chat.completions.create
    parts = [text("Look: "), seen(picture(1)), text(" and hear: "), heard(sound(300)), text(" What?")]
    answer = ask(model="eyes", messages=[{"role": "user", "content": parts}], **GREEDY)
    content = ["Look: ", ("image", picture(1)), " and hear: ", ("audio", sound(300)), " What?"]
    want, count = alone(server, content)
    assert answer.choices[0].message.content == want.split("\nUser:")[0]
    assert answer.usage.prompt_tokens == count > 4 + 5
    others = [
        ask(
            model="eyes",
            messages=[{"role": "user", "content": [text("Look: "), seen(picture(n)), *parts[2:]]}],
            **GREEDY,
        )
        for n in (2, 3)
    ]
    assert len({each.choices[0].message.content for each in (answer, *others)}) > 1  # it hangs on what is seen
    streamed = ask(model="eyes", messages=[{"role": "user", "content": parts}], stream=True, **GREEDY)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices)
    assert said == answer.choices[0].message.content


def test_the_same_picture_is_found_in_the_cache_and_another_is_not(server):
    def cached(n: int, words: str) -> tuple[int, int]:
        usage = server.http().post("/v1/chat/completions", json=asked([seen(picture(n)), text(words)])).json()["usage"]
        return usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]

    left, whole = cached(90, "Which?")
    assert left == whole == len("|User: ") + 4 + len("Which?\nAssistant:")  # |: the end-of-text token
    assert cached(90, "Which?")[0] == 1
    assert cached(90, "Where?")[0] == len("Where?\nAssistant:")  # another question
    assert cached(91, "Which?")[0] == whole


def test_the_example_sends_files(server, tmp_path):
    example = Path(__file__).parents[2] / "examples/openai_media.py"
    (tmp_path / "a.png").write_bytes(picture(1))
    (tmp_path / "b.wav").write_bytes(sound(300))
    env = {**os.environ, "OPENAI_BASE_URL": f"{server.url}/v1"}
    command = [sys.executable, str(example), "a.png", "b.wav", "What?"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
    content = [seen(picture(1)), heard(sound(300)), text("What?")]
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 200}
    said = server.http().post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    assert done.returncode == 0 and done.stdout == said + "\n", done.stderr


def test_a_session_remembers_what_it_saw(server):
    ask, how = server.client().chat.completions.create, {"extra_body": {"session": "gallery"}, **GREEDY}
    first = ask(model="eyes", messages=[{"role": "user", "content": [seen(picture(5)), text("One")]}], **how)
    said = first.choices[0].message.content
    second = ask(model="eyes", messages=[{"role": "user", "content": "And now?"}], **how)
    # read anew: the picture, what was said, and what is asked now
    service = server.service
    rows = Opener({"image": encoders_of(service.model)["image"].config}).rows
    messages = [{"role": "user", "content": [rows("image", picture(5)), "One"]}]
    ids = [*service.template.first(messages), *service.tokenizer.encode(said)]
    ids += service.template.next([{"role": "user", "content": "And now?"}])
    own = {"rows": rows_of(messages), "max_tokens": 9, "stop_ids": [256]}
    found = generate(service.model, ids, SamplingParams(temperature=0), **own)
    assert second.choices[0].message.content == service.tokenizer.decode([token.id for token in found])
    tokens = second.model_extra["session"]["tokens"]
    assert tokens == len(ids) + 8  # the last of nine is pending
    # what is refused leaves it as it was
    with pytest.raises(openai.BadRequestError):
        ask(model="eyes", messages=[{"role": "user", "content": [seen(picture(6)), seen(b"no")]}], **how)
    third = ask(model="eyes", messages=[{"role": "user", "content": "And now?"}], **how)
    assert third.model_extra["session"]["tokens"] == tokens + third.usage.total_tokens - 1


def test_a_picture_that_got_no_answer_is_forgotten(server):
    http, how = server.http(), {"session": "halfway", **GREEDY}
    chat = {"messages": [{"role": "user", "content": "Hello"}], **how}
    assert http.post("/v1/chat/completions", json=chat).status_code == 200
    endless = {**how, "stream": True, "max_tokens": 500, "logit_bias": {"256": -100}}
    endless["messages"] = [{"role": "user", "content": [seen(picture(7))]}]
    with http.stream("POST", "/v1/chat/completions", json=endless) as response:
        next(response.iter_lines())
    assert server.idle()
    [conversation] = [each for (_, name), each in server.service.sessions.held.items() if name == "halfway"]
    memory = conversation.memory
    ids = [*memory.pending, *b" and"]
    state = memory.state.clone()
    tokens = generate(server.service.model, ids, SamplingParams(temperature=0), max_tokens=9, state=state)
    want = server.service.tokenizer.decode([token.id for token in tokens])
    found = http.post("/v1/completions", json={"prompt": " and", **how}).json()
    assert found["choices"][0]["text"] == want and found["usage"]["prompt_tokens"] == len(ids)


def test_nobody_reads_for_who_waits_no_more(server, monkeypatch, eventually):
    """One request's sound is opened at a time; those whose time is over by then are not."""
    service, opened = server.service, []
    go_on = threading.Event()

    def slowly(kind, raw, most):
        opened.append(kind)
        assert go_on.wait(20)
        return open_media(kind, raw, most)

    open_media = service.open_media
    monkeypatch.setattr(service, "open_media", slowly)
    body = {"messages": [{"role": "user", "content": [heard(sound(300))]}], **GREEDY}

    def post(timeout: float) -> int:
        try:
            return server.http().post("/v1/chat/completions", json=body, timeout=timeout).status_code
        except httpx.ReadTimeout:
            return 0

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(post, 20)
        assert eventually(lambda: opened == ["audio"])
        second = pool.submit(post, 0.3)  # a client that leaves
        assert second.result() == 0
        monkeypatch.setattr(service, "options", replace(service.options, timeout=0.3))
        third = pool.submit(post, 20)
        assert eventually(lambda: service.in_flight >= 2)
        time.sleep(0.5)
        go_on.set()
        assert first.result() == 200 and third.result() == 504
    assert opened == ["audio"] and server.idle()


@pytest.mark.parametrize("package", ["PIL", "soxr"])
def test_a_server_that_cannot_open_what_it_takes_does_not_start(server, monkeypatch, package):
    monkeypatch.setattr(media, "find_spec", lambda name: name != package)
    with pytest.raises(ImportError, match=rf"needs {package}: pip install 'retentive\[multimodal\]'"):
        media.senses(server.service.model)


BAD = {
    "no-picture": ([seen(b"no picture")], "content[0].image_url.url", "the picture is no picture of PNG, JPEG, WEBP"),
    "far-away": (
        [text("a"), {"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}],
        "content[1].image_url.url", "expected the picture itself as a data URL, data:image/png;base64,…: addresses are",
    ),
    "a-file": (
        [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}],
        "content[0].image_url.url", "addresses are not fetched",
    ),
    "not-base64": (
        [{"type": "image_url", "image_url": {"url": "data:image/png;base64,@@"}}],
        "content[0].image_url.url", "expected base64",
    ),
    "no-sound": ([heard(b"no sound")], "content[0].input_audio.data", "the sound is no sound of WAV, FLAC or OGG"),
    "too-many": ([seen(picture(n)) for n in range(3)], "content[2]", "are at most 2 here"),
    "half-base64": (
        [{"type": "image_url", "image_url": {"url": "data:image/png;charset=utf-8;base64,é"}}],
        "content[0].image_url.url", "expected base64",
    ),
    "too-long": ([heard(sound(300, 9))], "content[0].input_audio.data", "the sound has 9 seconds, more than 4: cut it"),
    "long-together": (
        [heard(sound(300, 3)), heard(sound(300, 3))],
        "content[1].input_audio.data", "the sound has 3 seconds, more than 1: cut it",
    ),
    "long-in-all": ([heard(sound(300, 3)), text("a" * 80)], "messages", "tokens, this server takes 200"),
    "another-type": (
        [{"type": "image_url", "image_url": {"url": "data:text/plain;base64,iVBORw0KGgo="}}],
        "content[0].image_url.url", "data:text/plain: not the type of a picture; send data:image/png;base64,…",
    ),
    "no-base64": (
        [{"type": "image_url", "image_url": {"url": "data:image/png,iVBORw0KGgo="}}],
        "content[0].image_url.url", "data:image/png: not base64; send data:image/png;base64,…",
    ),
    "cut-short": ([seen(picture(1)[:20])], "content[0].image_url.url", "the picture: a PNG that is cut short after 20"),
    "nothing": ([], "content", "at least 1 item"),
    "no-type": ([{}], "content[0]", "expected a part of type text, image_url, input_audio"),
    "another-part": ([{"type": "video"}], "content[0]", "expected a part of type text, image_url, input_audio"),
    "another-format": (
        [{"type": "input_audio", "input_audio": {"data": "AA", "format": "mp3"}}],
        "content[0].input_audio.format", "'wav', 'flac' or 'ogg'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_named(server, case):
    content, param, words = BAD[case]
    before = set(server.service.sessions.held)
    body = {"messages": [{"role": "user", "content": content}], "session": case}
    response = server.http().post("/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert response.status_code == 400 and words in error["message"] and "\n" not in error["message"]
    assert error["param"] == (param if param == "messages" else f"messages[0].{param}")
    assert (error["code"] == "context_length_exceeded") == (case == "long-in-all")
    assert server.idle() and set(server.service.sessions.held) == before


def test_base64_may_be_broken_into_lines(server):
    raw, broken = picture(3), seen(b"")
    broken["image_url"]["url"] += base64.encodebytes(raw).decode()
    answers = [server.http().post("/v1/chat/completions", json=asked([each])).json() for each in (seen(raw), broken)]
    assert answers[0]["choices"][0]["message"] == answers[1]["choices"][0]["message"]


def test_an_answer_is_text(server):
    turns = [("user", "a"), ("assistant", [seen(picture(1))]), ("user", "b")]
    body = {"messages": [{"role": role, "content": content} for role, content in turns]}
    response = server.http().post("/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "messages[1].content")
    assert error["message"] == "an answer is text: pictures and sounds are the user's"


def test_the_page_is_told_what_it_may_send(server, retnet):
    assert server.http().get("/v1/info").json()["media"] == ["audio", "image"]
    assert retnet.http().get("/v1/info").json()["media"] == []


def test_a_larger_body_is_for_what_is_seen_and_not_for_text(server, retnet):
    for each, said in ((retnet, "the body"), (server, "the text")):
        most = each.service.options.most_body
        response = each.http().post("/v1/chat/completions", json=asked("a" * (most + 1)))
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
        assert response.json()["error"]["message"].startswith(f"{said} is larger than {most} bytes")
    wide = np.zeros((most, 1), np.uint8)
    wide[:] = np.random.default_rng(0).integers(0, 256, wide.shape)
    out = io.BytesIO()
    Image.fromarray(wide).save(out, "PNG")
    assert server.http().post("/v1/chat/completions", json=asked([seen(out.getvalue())])).status_code == 200


def test_most_media_bounds_what_is_seen_whatever_text_may_be(server, monkeypatch):
    monkeypatch.setattr(server.service, "options", replace(server.service.options, most_media=100))
    response = server.http().post("/v1/chat/completions", json=asked([seen(picture(0))]))
    assert response.status_code == 413 and "seen and heard is larger than 100 bytes" in response.text
