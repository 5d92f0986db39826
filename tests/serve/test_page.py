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
pytestmark = pytest.mark.slow


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
    [part] = here.answers()
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
    assert here.answers() == [first] and here.read() == read
    expect(here["speed"]).to_have_text(re.compile(r"^[\d,]+$"))
    here.settings(**ENDLESS)
    here["input"].fill("And then?")
    here["send"].click()
    expect(here.page.locator(".model").last).not_to_be_empty()
    here.page.reload()  # in the middle of an answer
    expect(here["model"]).to_have_text("retnet")
    part = here.answers()[-1]
    here.settings(**GREEDY)
    answer = here.say("Go on")
    assert [m["content"] for m in here.sent[-1]["messages"]] == ["And then?", part, "Go on"] and part
    for messages in ([{"role": "user", "content": "Hello"}], here.sent[-1]["messages"]):
        want = ask(server, "/v1/chat/completions", {"messages": messages, "session": "without-reload", **GREEDY})
    assert answer == want["message"]["content"]
    here["new"].click()
    assert kept(here) == []
    here.page.reload()
    expect(here["model"]).to_have_text("retnet")
    expect(here["log"]).to_be_empty()


LOST = re.compile("no longer has this conversation's state")


def loses_by_restart(server):
    server.service.sessions.held.clear()


def loses_by_eviction(server):
    sessions = server.service.sessions
    sessions.evicted.extend(sessions.held)
    sessions.held.clear()


@pytest.mark.parametrize("lose", [loses_by_restart, loses_by_eviction])
def test_a_lost_session_says_so_and_the_text_stays(lose, server, visit):
    here = visit(server.url)
    here.settings(**GREEDY)
    first = here.say("Hello")
    lose(server)
    second = here.say("And then?")
    messages = [{"role": "user", "content": "And then?"}]
    assert second == ask(server, "/v1/chat/completions", {"messages": messages, **GREEDY})["message"]["content"]
    assert here.answers() == [first, second]
    classes = here.page.locator("#log > *").evaluate_all("blocks => blocks.map((block) => block.className)")
    assert classes == ["you lost", "model lost", "note", "you", "model"]
    expect(here.page.locator(".note")).to_have_text(LOST)
    expect(here["error"]).to_be_empty()
    read = here.read()
    here.say("And then?")  # goes on in the new session
    assert here.read() > read
    expect(here.page.locator(".note")).to_have_count(1)


def test_a_page_that_is_opened_after_a_restart_says_what_was_lost(server, visit):
    here = visit(server.url)
    here.settings(**GREEDY)
    first = here.say("Hello")
    began = server.http().get("/v1/models").json()
    began["data"][0]["created"] += 60
    here.page.route("**/v1/models", lambda route: route.fulfill(json=began))
    loses_by_restart(server)
    for _ in range(2):  # it is said once
        here.page.reload()
        expect(here.page.locator(".note")).to_have_text(LOST)
        assert here.answers() == [first] and here.read() == 0
    here.settings(**GREEDY)
    assert here.say("Hello") == first
    here.page.reload()
    expect(here["model"]).to_have_text("retnet")
    assert here.answers() == [first, first] and here.read() > 0
    expect(here.page.locator(".note")).to_have_count(1)


def test_what_is_saved_of_a_lost_session_is_nothing(server, visit):
    here = visit(server.url)
    here["name"].fill("ada")
    here.page.keyboard.press("Enter")
    expect(here["error"]).to_have_text("There is nothing to save yet: send a message first.")
    here.settings(**GREEDY)
    here.say("Hello")
    loses_by_restart(server)
    here["name"].focus()
    here.page.keyboard.press("Enter")
    expect(here["error"]).to_contain_text("Nothing was saved")
    expect(here.page.locator(".note")).to_have_text(LOST)
    expect(here.page.locator("#states li")).to_have_count(0)


def test_the_browser_keeps_a_bounded_text(server, visit):
    here = visit(server.url)
    answers(here, "x" * 1000 + "end")
    here.say("y" * 250_000)
    [conversation] = kept(here)
    assert 200_000 < len(conversation) < 201_000
    here.page.reload()
    expect(here.page.locator(".note")).to_have_text("Text further up is no longer kept in this browser.")
    assert here.answers() == ["x" * 1000 + "end"]


def test_two_tabs_show_the_same_conversation(server, visit):
    here = visit(server.url)
    here.settings(**GREEDY)
    first = here.say("Hello")
    other = Visit(here.page.context.new_page())
    other.page.goto(server.url)
    expect(other["model"]).to_have_text("retnet")
    assert other.answers() == [first]
    other.settings(**GREEDY)
    second = other.say("And then?")
    expect(here.page.locator(".model")).to_have_count(2)
    assert here.answers() == [first, second] and here.read() == other.read()
    other["new"].click()
    expect(here["log"]).to_be_empty()


def kept(here: Visit) -> list[str]:
    """Conversations that the browser keeps, as JSON."""
    return here.page.evaluate(
        "Object.entries(localStorage).filter(([name]) => name.startsWith('conversation ')).map(([, kept]) => kept)"
    )


def answers(here: Visit, text: str, pieces: int = 1) -> None:
    """Lets the page hear `text`, in pieces, as the answer to all that it asks."""
    size = -(-len(text) // pieces)
    parts = [text[at : at + size] for at in range(0, len(text), size)]
    choices = [{"index": 0, "delta": {"content": part}, "finish_reason": None} for part in parts]
    events = [{"choices": [choice]} for choice in [*choices, {"index": 0, "delta": {}, "finish_reason": "stop"}]]
    events.append(
        {
            "choices": [],
            "usage": {"prompt_tokens": 20, "completion_tokens": 80},
            "session": {"tokens": 1000, "bytes": 1_200_000},
        }
    )
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    here.page.route("**/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))


MARKDOWN = """# Trees

Some **bold**, *slanted* and `a * b` of a snake_case_name, 2 * 3 * 4.

1. one
2. two
   - nested

```python
def f(x):
    return "<b>"
```

> said

| a | b |
|---|---|
| 1 | **2** |

[a link](https://example.org/a_(b)) and https://example.org/c."""


@pytest.mark.parametrize("pieces", [1, 50])
def test_an_answer_in_markdown_is_shown_as_such(pieces, server, visit):
    here = visit(server.url)
    here.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    answers(here, MARKDOWN, pieces)
    assert here.say("**plain**") == MARKDOWN
    assert here.page.locator(".you").inner_html() == "**plain**"
    model = here.page.locator(".model")
    for selector, texts in {
        "h3": ["Trees"], "strong": ["bold", "2"], "em": ["slanted"], "p code": ["a * b"], "ol > li > p": ["one", "two"],
        "ol ul p": ["nested"], "pre": ['def f(x):\n    return "<b>"'], ".code span": ["python"], "blockquote": ["said"],
        "th": ["a", "b"], "td": ["1", "2"], "a": ["a link", "https://example.org/c"],
    }.items():  # fmt: skip
        assert model.locator(selector).all_text_contents() == texts, selector
    link = model.get_by_role("link", name="a link")
    expect(link).to_have_attribute("href", "https://example.org/a_(b)")
    expect(link).to_have_attribute("rel", "noopener noreferrer")
    expect(link).to_have_attribute("target", "_blank")
    model.get_by_role("button", name="Copy code").click()
    expect(model.get_by_role("button", name="Copied")).to_be_visible()
    assert here.page.evaluate("navigator.clipboard.readText()") == 'def f(x):\n    return "<b>"'
    before = model.inner_html().replace("Copied", "Copy code")
    here.page.reload()
    expect(model.locator("h3")).to_be_visible()
    assert model.inner_html() == before


EVIL = """<img id=evil src=x onerror=alert(1)> <script>alert(1)</script>

[a](javascript:alert(1)) [b](data:text/html,x) ![c](//example.org/x.png) [d](JAVASCRIPT:alert(1))

```html
</code></pre><img id=evil src=x onerror=alert(1)>
```

| <img id=evil src=x onerror=alert(1)> | b |
|-|-|"""


def test_what_an_answer_says_stays_text(server, visit):
    here = visit(server.url)
    answers(here, EVIL)
    assert here.say("Hello") == EVIL
    model = here.page.locator(".model")
    expect(model.locator("img, script, a, [onerror], [id]")).to_have_count(0)
    expect(model.locator("p").first).to_have_text("<img id=evil src=x onerror=alert(1)> <script>alert(1)</script>")
    expect(model).to_contain_text("[a](javascript:alert(1))")


HARD = ["*a " * 9000, "[" * 30_000, "_*" * 9000, "> " * 9000, "- " * 9000, "`" * 99 + "``` `" * 5000, "|-" * 9000]


def test_no_answer_takes_the_page_long(server, visit):
    here = visit(server.url)
    draw = """async (text) => {
      const { render } = await import("./markdown.js");
      const [place, began] = [document.createElement("div"), performance.now()];
      for (let n = 1; n <= 20; n++) render(place, text.slice(0, (n * text.length) / 20));
      return performance.now() - began;
    }"""
    for text in HARD:
        assert here.page.evaluate(draw, text) < 5000, text[:20]


def test_the_state_is_compared_with_a_cache(server, visit):
    here = visit(server.url)
    per_token = server.http().get("/v1/info").json()["kv_cache_bytes_per_token"]
    assert per_token == 2 * 2 * 32 * 2  # keys and values of two layers of width 32, in 16 bits
    expect(here["cache"]).to_have_text("A Transformer’s KV cache would grow by 256 B with each token")
    answers(here, "Hello")
    here.say("Hello")
    expect(here["cache"]).to_have_text("State 1.20 MB · a Transformer’s KV cache would hold 256 kB")


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
    here.page.get_by_role("button", name="Continue from ada.1").click()
    expect(here.page.locator(".note")).to_contain_text(f"remembers the {read:,} tokens")
    assert here.read() == read
    assert here.say("What is my name?") == goes_on
    other = visit(server.url)  # another visitor with the same key, or none, finds it too
    expect(other.page.locator("#states li span")).to_contain_text("ada.1")
    here["name"].fill("ada.1")  # the same name
    here.page.keyboard.press("Enter")
    expect(here["question"]).to_contain_text("Replace the saved state “ada.1”?")
    here.page.get_by_role("button", name="Cancel").click()
    here.page.get_by_role("button", name="Delete ada.1").click()
    expect(here["question"]).to_contain_text("Delete the saved state “ada.1”?")
    expect(here.page.locator(":focus")).to_have_text("Cancel")
    here.page.keyboard.press("Escape")
    expect(here.page.locator("#states li")).to_have_count(1)
    here.page.get_by_role("button", name="Delete ada.1").click()
    here["yes"].click()
    expect(here.page.locator("#states li")).to_have_count(0)
    assert server.service.saved.listed(next(iter(server.service.sessions.held))[0]) == []


def test_a_state_that_cannot_be_continued_from_leaves_the_conversation(server, visit):
    here = visit(server.url)
    here.settings(**GREEDY)
    first = here.say("Hello")
    here["name"].fill("ada")
    here.page.keyboard.press("Enter")
    expect(here.page.locator("#states li")).to_have_count(1)
    [file] = server.service.saved.folder.glob("*/ada.safetensors")
    file.write_bytes(file.read_bytes()[:-10])
    here.page.get_by_role("button", name="Continue from ada").click()
    expect(here["error"]).not_to_be_empty()
    assert here.answers() == [first]
    read = here.read()
    here.say("And then?")
    assert here.read() > read
    expect(here.page.locator(".note")).to_have_count(1)  # that it was saved


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
    expect(here["cache"]).to_be_hidden()


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
    here.page.get_by_role("button", name="Continue from phone").click()
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
    here.page.reload()
    expect(here["model"]).to_have_text("retnet")
    assert here.page.evaluate("[{ ...sessionStorage }, document.cookie]") == [{"api-key": "open-sesame"}, ""]
    [conversation] = kept(here)
    assert "Hello" in conversation and "open-sesame" not in conversation


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
    assert here.page.locator(".model").text_content() == here.page.locator(".you").text_content() == evil
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
    expect(here["error"]).to_contain_text("the pictures and sounds of a request are at most 2")
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
