"""The page in a real headless Chromium, on a real server with a tiny random model.

The oracle is the server's API: the page shows what it says to the same question. Nothing but loopback is asked.
"""

import json
import re
import threading

import pytest

from retentive.data.templates import BUILT_IN
from tests.pages import PHONE, Visit, expect

GREEDY = {"temperature": 0, "max_tokens": 40}
ENDLESS = {"temperature": 0, "max_tokens": 1_000_000}


@pytest.fixture
def server(serve, tmp_path):
    """A server of a model that came with a chat template, so that it is one to chat with."""
    file = tmp_path / "chat_template.jinja"
    file.write_text(BUILT_IN)
    return serve("retnet", template=file, max_tokens=ENDLESS["max_tokens"])


def ask(server, path: str, body: dict) -> dict:
    """The first choice of what the API says."""
    return server.http().post(path, json=body).json()["choices"][0]


def test_answers_stream_in_and_are_the_servers_own(server, visit):
    here = visit(server.url)
    here.settings(**GREEDY)
    first = here.say("Hello")
    messages = [{"role": "user", "content": "Hello"}]
    assert first == ask(server, "/v1/chat/completions", {"messages": messages, **GREEDY})["message"]["content"] != ""
    second = here.say("And then?")
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "And then?"}]
    assert [m["content"] for m in here.sent[1]["messages"]] == ["And then?"]  # the rest is in the state
    assert len(second) > 0 and here.page.locator(".you").all_text_contents() == ["Hello", "And then?"]
    expect(here["speed"]).to_have_text(re.compile(r"^[\d,]+$"))
    expect(here["first"]).to_have_text(re.compile(r"^[\d.]+ m?s$"))


def test_tokens_read_grow_and_the_states_bytes_do_not(server, visit):
    here = visit(server.url)
    here.settings(**GREEDY)
    read, held = [here.read()], []
    for text in ("Hello", "Tell me more, and take your time. " * 20, "And then?"):
        here.say(text)
        read.append(here.read())
        held.append(here["bytes"].text_content())
    assert read[0] == 0 and read[1] > 40 and read[2] > read[1] + 600 and read[3] > read[2]
    assert len(set(held)) == 1 and held[0].endswith(" kB")
    expect(here["kind"]).to_have_text("State, constant")


def test_settings_are_what_the_server_is_asked_for(server, visit):
    here = visit(server.url)
    here.settings(temperature=1.5, top_p=0.5, max_tokens=7, seed=3, stops="\\n\nEnd")
    here.say("Hello")
    asked = here.sent[0]
    assert {k: asked[k] for k in ("temperature", "top_p", "max_tokens", "seed", "stop")} == {
        "temperature": 1.5, "top_p": 0.5, "max_tokens": 7, "seed": 3, "stop": ["\n", "End"],
    }  # fmt: skip
    here.settings(temperature=9)
    here["input"].fill("not sent")
    here.page.keyboard.press("Enter")
    expect(here["input"]).to_have_value("not sent")
    assert len(here.sent) == 1


def test_it_is_used_by_keyboard_alone(server, visit):
    here = visit(server.url)
    keyboard = here.page.keyboard
    here.settings(**ENDLESS)
    here["input"].focus()
    keyboard.type("two")
    keyboard.press("Shift+Enter")
    keyboard.type("lines")
    expect(here["input"]).to_have_value("two\nlines")
    keyboard.press("Enter")
    expect(here.page.locator(".model")).not_to_be_empty()
    keyboard.press("Escape")
    expect(here["log"]).to_have_attribute("aria-busy", "false")
    assert server.idle()
    expect(here["input"]).to_be_focused()
    passed = []
    for _ in range(7):
        keyboard.press("Tab")
        passed.append(here.page.locator(":focus").get_attribute("id"))
    assert passed == ["send", "temperature", "top_p", "max_tokens", "seed", "stops", "name"]
    here["input"].focus()
    for id in ("log", "theme", "new"):
        keyboard.press("Shift+Tab")
        expect(here[id]).to_be_focused()
    keyboard.press("Enter")
    expect(here["log"]).to_be_empty()
    expect(here["input"]).to_be_focused()


def test_what_was_stopped_is_sent_with_the_next_message(server, visit):
    here = visit(server.url)
    here.settings(**ENDLESS)
    here["input"].fill("Hello")
    here["send"].click()
    expect(here.page.locator(".model")).not_to_be_empty()
    here["stop"].click()
    expect(here["log"]).to_have_attribute("aria-busy", "false")
    part = here.page.locator(".model").text_content()
    here.settings(**GREEDY)
    answer = here.say("Go on")
    messages = here.sent[1]["messages"]
    assert messages == [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": part},
        {"role": "user", "content": "Go on"},
    ]
    assert answer == ask(server, "/v1/chat/completions", {"messages": messages, **GREEDY})["message"]["content"]


def test_a_reload_goes_on_with_the_conversation(server, visit):
    here = visit(server.url)
    here.settings(**GREEDY)
    first, read = here.say("Hello"), here.read()
    here.page.reload()
    expect(here["model"]).to_have_text("retnet")
    assert here.page.locator(".you").all_text_contents() == ["Hello"]
    assert here.page.locator(".model").all_text_contents() == [first] and here.read() == read
    here.settings(**ENDLESS)
    here["input"].fill("And then?")
    here["send"].click()
    expect(here.page.locator(".model").last).not_to_be_empty()
    here.page.reload()  # in the middle of an answer
    expect(here["model"]).to_have_text("retnet")
    part = here.page.locator(".model").last.text_content()
    here.settings(**GREEDY)
    answer = here.say("Go on")
    assert [m["content"] for m in here.sent[-1]["messages"]] == ["And then?", part, "Go on"] and part
    for messages in ([{"role": "user", "content": "Hello"}], here.sent[-1]["messages"]):
        want = ask(server, "/v1/chat/completions", {"messages": messages, "session": "without-reload", **GREEDY})
    assert answer == want["message"]["content"]
    here["new"].click()
    here.page.reload()
    expect(here["log"]).to_be_empty()


def test_a_session_that_is_still_busy_is_waited_for(server, visit):
    """As it is for a moment after an answer was stopped."""
    here = visit(server.url)
    here.settings(**GREEDY)
    here.say("Hello")
    sessions = server.service.sessions
    [session] = sessions.held
    sessions.busy.add(session)
    free = threading.Timer(0.5, lambda: sessions.busy.discard(session))
    free.start()
    assert here.say("And then?") != ""
    expect(here["error"]).to_be_empty()
    assert len(here.sent) > 2
    free.join()


def test_a_state_is_saved_restored_and_deleted(server, visit):
    here = visit(server.url)
    here.settings(**GREEDY)
    here.say("My name is Ada.")
    read = here.read()
    here["name"].fill("ada.1")
    here.page.keyboard.press("Enter")
    expect(here.page.locator("#states li")).to_have_count(1)
    goes_on = here.say("What is my name?")
    here["new"].click()
    assert here.read() == 0 and here["log"].text_content() == ""
    assert here.say("What is my name?") != goes_on  # who was not told
    here.page.get_by_role("button", name="Restore ada.1").click()
    expect(here.page.locator(".note")).to_contain_text(f"remembers the {read:,} tokens")
    assert here.read() == read
    assert here.say("What is my name?") == goes_on
    other = visit(server.url)  # another visitor with the same key, or none, finds it too
    expect(other.page.locator("#states li span")).to_contain_text("ada.1")
    here.page.get_by_role("button", name="Delete ada.1").click()
    expect(here.page.locator("#states li")).to_have_count(0)
    assert server.service.saved.listed(next(iter(server.service.sessions.held))[0]) == []


def test_a_base_model_writes_on(serve, visit):
    server = serve("retnet")
    here = visit(server.url)
    expect(here.page.get_by_label("Continue text")).to_be_checked()
    expect(here["send"]).to_have_text("Continue")
    here.settings(**GREEDY)
    text = here.say("Once upon")
    assert text == ask(server, "/v1/completions", {"prompt": "Once upon", **GREEDY})["text"] != ""
    further = here.say("")
    assert text + further == ask(server, "/v1/completions", {"prompt": "Once upon", **GREEDY, "max_tokens": 80})["text"]
    expect(here.page.get_by_label("Chat")).to_be_disabled()  # a text that has begun stays what it is
    here["new"].click()
    here.page.get_by_label("Chat").check()
    here.say("Hello")
    assert here.sent[-1]["messages"][0]["content"] == "Hello"


def test_the_twins_cache_is_said_to_grow(serve, visit):
    here = visit(serve("transformer").url, model="transformer")
    here.settings(**GREEDY)
    here.say("Once upon")
    before = here["bytes"].text_content()
    here.say("a time. " * 50)
    assert here["bytes"].text_content() != before
    expect(here["kind"]).to_have_text("Cache, growing")


def test_light_and_dark(server, visit):
    def background(here: Visit) -> str:
        return here.page.evaluate("getComputedStyle(document.body).backgroundColor")

    light, dark = visit(server.url, color_scheme="light"), visit(server.url, color_scheme="dark")
    colours = background(light), background(dark)
    assert colours == ("rgb(247, 247, 245)", "rgb(22, 24, 26)")
    light["theme"].click()
    assert background(light) == colours[1]
    light.page.reload()
    assert background(light) == colours[1]  # it was meant
    dark["theme"].click()
    assert background(dark) == colours[0]


def test_on_a_phones_screen_everything_is_within_reach(server, visit):
    here = visit(server.url, viewport=PHONE, has_touch=True)
    here.settings(**GREEDY)
    here.say("averylongwordwithoutanyspaces" * 20)
    expect(here["send"]).to_be_in_viewport()
    expect(here["stats"]).to_be_in_viewport()
    assert here.page.evaluate("document.documentElement.scrollWidth") <= 360
    here["more"].click()
    for id in ("temperature", "max_tokens", "stops", "name"):
        here[id].scroll_into_view_if_needed()
        box = here[id].bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360
    here["name"].fill("phone")
    here.page.keyboard.press("Enter")
    here.page.get_by_role("button", name="Restore phone").click()
    expect(here["input"]).to_be_focused()  # back at the conversation
    assert here.page.evaluate("document.documentElement.scrollWidth") <= 360


def test_a_key_is_asked_for_and_kept_in_the_tab_alone(serve, visit):
    here = visit(serve("retnet", api_key=("open-sesame",)).url, model=None)
    expect(here["login"]).to_be_visible()
    expect(here["key"]).to_be_focused()
    here["key"].fill("wrong")
    here.page.keyboard.press("Enter")
    expect(here["error"]).to_have_text("The server refused the API key.")
    expect(here["login"]).to_be_visible()
    here["key"].fill("open-sesame")
    here.page.keyboard.press("Enter")
    expect(here["model"]).to_have_text("retnet")
    expect(here["error"]).to_be_empty()
    here.settings(**GREEDY)
    assert here.say("Hello")
    kept = here.page.evaluate("[{ ...sessionStorage }, Object.values(localStorage), document.cookie]")
    assert kept == [{"api-key": "open-sesame"}, [], ""]
    here.page.reload()
    expect(here["model"]).to_have_text("retnet")
    [other] = here.page.evaluate("Object.keys(sessionStorage).filter((name) => name !== 'api-key')")
    assert other == "conversation" and here.page.evaluate("[Object.values(localStorage), document.cookie]") == [[], ""]


def test_what_goes_wrong_is_told_in_a_line_and_no_word_is_lost(server, visit):
    here = visit(server.url)
    here.settings(**GREEDY)
    server.service.in_flight += 10**6
    here["input"].fill("Hello")
    here.page.keyboard.press("Enter")
    expect(here["error"]).to_have_text("The server is full: try again in 1 s.")
    expect(here["input"]).to_have_value("Hello")
    server.service.in_flight -= 10**6
    here.page.keyboard.press("Enter")
    expect(here.page.locator(".model")).not_to_be_empty()
    expect(here["error"]).to_be_empty()
    here.say("And then?")
    expect(here["error"]).to_be_empty()
    server.service.sessions.held.clear()  # as after a restart
    here.say("And then?")
    expect(here["error"]).to_contain_text("had lost this conversation's state")
    server.service.draining = True
    here["input"].fill("Still there?")
    here.page.keyboard.press("Enter")
    expect(here["error"]).to_have_text("the server is stopping")
    server.stop()
    here.page.keyboard.press("Enter")
    expect(here["error"]).to_have_text("The server does not answer. Is it still running?")
    expect(here["input"]).to_have_value("Still there?")


BROKEN = {
    "cut-short": ("", "The connection broke in the middle of the answer."),
    "error": ('data: {"error": {"message": "the model failed"}}\n\n', "the model failed"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_answer_that_breaks_off_says_so_and_text_stays_text(case, server, visit):
    more, words = BROKEN[case]
    evil = "<img id=evil src=x onerror=alert(1)>"
    event = {"choices": [{"index": 0, "delta": {"content": evil}, "finish_reason": None}]}
    here = visit(server.url)
    body = f"data: {json.dumps(event)}\n\n{more}"
    here.page.route("**/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    assert here.say(evil) == evil
    expect(here["error"]).to_have_text(words)
    expect(here["evil"]).to_have_count(0)


def test_the_page_asks_for_nothing_that_its_policy_would_have_to_allow(server):
    page = server.http().get("/")
    assert page.headers["Content-Security-Policy"].startswith("default-src 'self'")
    assert not re.search(r"<script(?![^>]*src=)|\sstyle=|\son\w+=|https?://", page.text)


def test_a_picture_and_a_sound_go_with_a_message(eyes, visit, tmp_path):
    pytest.importorskip("PIL", reason="pictures need pip install 'retentive[multimodal]'")
    soundfile = pytest.importorskip("soundfile", reason="sound needs pip install 'retentive[multimodal]'")
    from PIL import Image

    Image.new("RGB", (64, 64), "teal").save(tmp_path / "tile.png")
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "tile.gif")
    soundfile.write(tmp_path / "tone.wav", [0.0, 0.5, 0.0, -0.5] * 300, 8000)
    here = visit(eyes.url, model="eyes")
    here.settings(**GREEDY)
    here["files"].set_input_files([tmp_path / "tile.png", tmp_path / "tone.wav", tmp_path / "tile.gif"])
    expect(here.page.locator("#given figure")).to_have_count(3)
    here.page.get_by_label("Remove tile.gif").click()
    expect(here.page.locator("#given img")).to_have_count(1)
    answer = here.say("What?")
    expect(here["given"]).to_be_hidden()
    parts = here.sent[0]["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_url", "input_audio", "text"]
    assert parts[0]["image_url"]["url"].startswith("data:image/png;base64,") and parts[2]["text"] == "What?"
    body = {"messages": here.sent[0]["messages"], **GREEDY}
    assert answer == ask(eyes, "/v1/chat/completions", body)["message"]["content"] != ""
    expect(here.page.locator(".you img")).to_have_count(1)
    expect(here.page.locator(".you audio")).to_have_count(1)
    tokens = here.read()
    here.say("And?")
    assert here.sent[1]["messages"] == [{"role": "user", "content": "And?"}] and here.read() > tokens
    # what the model refuses comes back to where it was, and the reason is said
    here["files"].set_input_files([tmp_path / "tile.png"] * 3)
    here["input"].fill("Three?")
    here.page.keyboard.press("Enter")
    expect(here["error"]).to_contain_text("a request may have at most 2 pictures and sounds")
    expect(here.page.locator("#given img")).to_have_count(3)
    expect(here["input"]).to_have_value("Three?")
    here["files"].set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"})
    expect(here["error"]).to_have_text("a.png is not a picture that this browser can show.")


SLOWLY = """() => {
  const ask = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
  window.asked = 0;
  navigator.mediaDevices.getUserMedia = async (how) => {
    window.asked += 1;
    await new Promise((done) => setTimeout(done, 300));
    return ask(how);
  };
}"""
"""A browser that takes its time to give the microphone, and counts how often it was asked."""


def test_a_recording_goes_with_a_message(eyes, visit):
    pytest.importorskip("soxr", reason="sound needs pip install 'retentive[multimodal]'")
    pytest.importorskip("soundfile", reason="sound needs pip install 'retentive[multimodal]'")
    here = visit(eyes.url, model="eyes")
    here.settings(**GREEDY)
    here.page.evaluate(SLOWLY)
    here["record"].dblclick()  # the second click comes while the browser asks
    expect(here["record"]).to_have_attribute("aria-pressed", "true")
    assert here.page.evaluate("asked") == 1
    here.page.wait_for_timeout(300)
    here["record"].click()
    expect(here.page.locator("#given audio")).to_have_count(1)
    expect(here["record"]).to_have_attribute("aria-pressed", "false")
    assert here.say("What?") != ""
    assert [part["type"] for part in here.sent[0]["messages"][0]["content"]] == ["input_audio", "text"]


def test_who_reads_text_alone_is_offered_no_more(server, visit):
    here = visit(server.url)
    expect(here["attach"]).to_be_hidden()
    expect(here["record"]).to_be_hidden()
