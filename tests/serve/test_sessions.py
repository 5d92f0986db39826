"""Sessions and saved states: what is kept, for whom, and that nothing else gets in or out.

The oracle is the model that reads the whole conversation at once: a session's text goes on as if it had.
"""

import threading

import pytest

from retentive.data.tokenizer import ByteTokenizer
from retentive.infer.conversation import Conversation
from retentive.infer.requests import Full
from retentive.serve.errors import Refused
from retentive.serve.sessions import EVICTED, Sessions
from tests.serve.asked import CHAT, START, TEXT


def chat(http, content: str, session: str | None = "s", **more):
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "session": session, **more}
    response = http.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.fixture(params=["retnet", "transformer"])
def server(request, serve):
    return serve(request.param)


@pytest.mark.parametrize("stop", [False, True], ids=["to-its-length", "to-a-stop-string"])
def test_a_chat_goes_on_as_if_all_were_sent_again(server, stop):
    http, said = server.http(), b""
    for n in range(4):
        said += f"{'' if n == 0 else chr(10)}User: line {n}\nAssistant:".encode()
        whole = server.text([*START, *said], max_tokens=20, temperature=0)
        want = whole[: whole.index(whole[9:11])] if stop else whole
        reply = chat(http, f"line {n}", max_tokens=20, stop=whole[9:11] if stop else None)
        assert reply["choices"][0]["message"]["content"] == want
        said += want.encode()
        read = 1 + len(said) - (0 if stop else 1)  # the last token has been picked, not read
        assert reply["session"]["tokens"] == read
    assert reply["usage"]["prompt_tokens"] < len(said) / 3
    [conversation] = server.service.sessions.held.values()
    model, state = server.service.model, conversation.memory.state
    assert not model.config.constant_state or state.nbytes == model.init_state(1).nbytes


def test_a_streamed_chat_keeps_its_session_too(server):
    client = server.client()
    said = "User: a\nAssistant:"
    first = server.text([*START, *said.encode()], max_tokens=12, temperature=0)
    second = server.text([*START, *f"{said}{first}\nUser: b\nAssistant:".encode()], max_tokens=12, temperature=0)
    got = []
    for content in "ab":
        with client.chat.completions.create(
            model=server.service.name, messages=[{"role": "user", "content": content}], stream=True, temperature=0,
            max_tokens=12, extra_body={"session": "s"}, stream_options={"include_usage": True},
        ) as chunks:  # fmt: skip
            chunks = list(chunks)
        got.append("".join(c.choices[0].delta.content or "" for c in chunks[:-1]))
        assert chunks[-1].session["name"] == "s"
    assert got == [first, second]


def test_a_completion_goes_on_where_the_last_one_ended(server):
    http, text = server.http(), b""
    for piece in ("Once upon", " and then", ""):
        text += piece.encode()
        want = server.text([*START, *text], max_tokens=10, temperature=0)
        body = {"prompt": piece, "max_tokens": 10, "temperature": 0, "session": "s"}
        assert http.post(TEXT, json=body).json()["choices"][0]["text"] == want
        text += want.encode()


def test_an_end_of_text_is_not_read_twice(server):
    http, end = server.http(), {"256": 100}
    assert chat(http, "a", logit_bias=end)["choices"][0]["message"]["content"] == ""
    said = b"User: a\nAssistant:\nUser: b\nAssistant:"
    want = server.text([*START, *said], max_tokens=10, temperature=0)
    assert chat(http, "b", max_tokens=10)["choices"][0]["message"]["content"] == want


def test_what_is_read_only_is_kept_as_well(server):
    http = server.http()
    body = {"prompt": "Once upon a time", "max_tokens": 0, "session": "s"}
    assert http.post(TEXT, json=body).json()["session"]["tokens"] == 17
    body = {"prompt": " there", "max_tokens": 9, "temperature": 0, "session": "s"}
    want = server.text([*START, *b"Once upon a time there"], max_tokens=9, temperature=0)
    assert http.post(TEXT, json=body).json()["choices"][0]["text"] == want


def test_what_is_broken_off_leaves_the_session_as_it_was(serve):
    server = serve(max_tokens=10**6)
    http = server.http()
    chat(http, "a", max_tokens=5)
    body = {"messages": [{"role": "user", "content": "b"}], "session": "s", "stream": True, "max_tokens": 10**6}
    with http.stream("POST", CHAT, json={**body, "logit_bias": {"256": -100}}) as response:
        for n, _ in enumerate(response.iter_lines()):
            if n == 10:
                break
    assert server.idle()
    first = server.text([*START, *b"User: a\nAssistant:"], max_tokens=5, temperature=0)
    want = server.text(
        [*START, *f"User: a\nAssistant:{first}\nUser: c\nAssistant:".encode()], max_tokens=8, temperature=0
    )
    assert chat(http, "c", max_tokens=8)["choices"][0]["message"]["content"] == want


def test_one_session_answers_one_request_at_a_time(serve):
    server = serve(max_tokens=10**6)
    http = server.http()
    body = {"prompt": "a", "session": "s", "stream": True, "max_tokens": 10**6, "logit_bias": {"256": -100}}
    with http.stream("POST", TEXT, json=body) as response:
        lines = response.iter_lines()
        next(lines)
        for method, path, sent in (
            ("POST", TEXT, {"prompt": "b", "session": "s"}),
            ("POST", "/v1/states", {"session": "s", "name": "n"}),
            ("DELETE", "/v1/sessions/s", None),
        ):
            refused = http.request(method, path, json=sent)
            assert refused.status_code == 409 and refused.json()["error"]["code"] == "session_busy", path
        assert http.post(TEXT, json={"prompt": "b", "session": "t", "max_tokens": 1}).status_code == 200
    assert server.idle()
    assert http.post(TEXT, json={"prompt": "b", "session": "s", "max_tokens": 1}).status_code == 200


def test_a_state_is_saved_listed_restored_and_deleted(server):
    http = server.http()
    first = chat(http, "a", max_tokens=7)
    saved = http.post("/v1/states", json={"session": "s", "name": "my.state-1"}).json()
    assert saved["name"] == "my.state-1" and saved["model"] == server.service.name and saved["bytes"] > 8000
    assert saved["tokens"] == first["session"]["tokens"]
    assert http.get("/v1/states").json() == {"object": "list", "data": [saved]}
    want = chat(http, "b", max_tokens=15)["choices"]
    for session in ("s", "other"):  # in place of what it had read, and anew
        restored = http.post("/v1/states/my.state-1/restore", json={"session": session}).json()
        assert restored["tokens"] == saved["tokens"]
        assert chat(http, "b", session, max_tokens=15)["choices"] == want
    assert http.delete("/v1/states/my.state-1").json()["deleted"] is True
    assert http.get("/v1/states").json()["data"] == []
    assert http.delete("/v1/states/my.state-1").status_code == 404
    assert http.post("/v1/states/my.state-1/restore", json={"session": "s"}).status_code == 404


def test_a_session_whose_answers_could_not_be_read_yet_is_saved_and_restored(server, monkeypatch):
    """A stop string cuts an answer, and the queue is full when the rest is to be read: all of it stays pending."""
    http, stop = server.http(), server.text([*START, *b"User: a\nAssistant:"], max_tokens=9, temperature=0)[6:8]

    def turns(name: str, between):
        chat(http, "a", name, max_tokens=9, stop=stop)
        between()
        return chat(http, "b", name, max_tokens=15)["choices"]

    def moved():
        [conversation] = [x for (_, name), x in server.service.sessions.held.items() if name == "late"]
        assert not conversation.memory.tokens and conversation.memory.pending
        assert http.post("/v1/states", json={"session": "late", "name": "n"}).status_code == 200
        assert http.delete("/v1/sessions/late").status_code == 200
        assert http.post("/v1/states/n/restore", json={"session": "late"}).status_code == 200

    want = turns("prompt", lambda: None)
    submit = Conversation.submit

    def full(conversation, ids, *positional, **options):
        if ids is conversation.memory.pending:
            raise Full("the queue is full")
        return submit(conversation, ids, *positional, **options)

    monkeypatch.setattr(Conversation, "submit", full)
    assert turns("late", moved) == want


FILE = {"Content-Type": "application/octet-stream"}


def test_a_state_goes_to_another_server_as_a_file(serve, tmp_path):
    here, there = serve(), serve(states=tmp_path / "elsewhere")
    saved = chat(here.http(), "a", max_tokens=7)["session"]
    assert here.http().post("/v1/states", json={"session": "s", "name": "n"}).status_code == 200
    file = here.http().get("/v1/states/n")
    assert "attachment" in file.headers["content-disposition"]
    sent = there.http().put("/v1/states/taken", content=file.content, headers=FILE)
    assert sent.status_code == 200 and sent.json()["tokens"] == saved["tokens"]
    assert there.http().post("/v1/states/taken/restore", json={"session": "s"}).status_code == 200
    want = chat(here.http(), "b", max_tokens=15)["choices"]
    assert chat(there.http(), "b", max_tokens=15)["choices"] == want
    assert here.http().get("/v1/states/none").status_code == 404


@pytest.mark.parametrize("how", ["truncated", "tampered", "no-state", "other-model", "too-large", "no-file"])
def test_a_bad_file_is_not_taken(serve, tmp_path, how):
    server, other = serve(), serve("other", states=tmp_path / "theirs")
    for each in (server, other):
        chat(each.http(), "a", max_tokens=5)
        assert each.http().post("/v1/states", json={"session": "s", "name": "n"}).status_code == 200
    (mine,), (theirs,) = (list(each.service.states_folder.rglob("*.safetensors")) for each in (server, other))
    if how == "too-large":
        mine.write_bytes(bytes(server.service.largest_state + 1))
    elif how != "no-file":
        wreck(mine, how, theirs)
    headers = {"Content-Type": "application/json"} if how == "no-file" else FILE
    response = server.http().put("/v1/states/new", content=mine.read_bytes(), headers=headers)
    codes = {"too-large": (413, "larger than"), "no-file": (415, "expected Content-Type: application/octet-stream")}
    words = {"truncated": "complete", "tampered": "changed", "no-state": "complete", "other-model": "another model"}
    code, word = codes.get(how) or (409, words[how])
    assert response.status_code == code and word in response.json()["error"]["message"]
    assert str(tmp_path) not in response.text and "/tmp" not in response.text
    assert [state["name"] for state in server.http().get("/v1/states").json()["data"]] == ["n"]


def test_a_state_outlives_the_server(serve):
    server = serve()
    chat(server.http(), "a", max_tokens=7)
    assert server.http().post("/v1/states", json={"session": "s", "name": "n"}).status_code == 200
    want = chat(server.http(), "b", max_tokens=15)["choices"]
    again = serve()
    assert again.http().post("/v1/states/n/restore", json={"session": "s"}).status_code == 200
    assert chat(again.http(), "b", max_tokens=15)["choices"] == want


def test_what_one_key_keeps_no_other_sees(serve):
    server = serve(api_key=("a", "b"))
    mine, theirs = server.http("a"), server.http("b")
    chat(mine, "a secret", max_tokens=5)
    assert mine.post("/v1/states", json={"session": "s", "name": "n"}).status_code == 200
    assert theirs.get("/v1/states").json()["data"] == []
    assert theirs.post("/v1/states/n/restore", json={"session": "s"}).status_code == 404
    assert theirs.get("/v1/states/n").status_code == theirs.delete("/v1/states/n").status_code == 404
    assert theirs.post("/v1/states", json={"session": "s", "name": "m"}).status_code == 404
    assert theirs.delete("/v1/sessions/s").status_code == 404
    # a session of the same name begins anew
    want = server.text([*START, *b"User: hi\nAssistant:"], max_tokens=10, temperature=0)
    assert chat(theirs, "hi", max_tokens=10)["choices"][0]["message"]["content"] == want
    assert theirs.post("/v1/states", json={"session": "s", "name": "n"}).status_code == 200
    assert theirs.delete("/v1/states/n").status_code == 200
    assert [s["name"] for s in mine.get("/v1/states").json()["data"]] == ["n"]
    folders = [path.name for path in server.service.states_folder.iterdir()]
    assert len(folders) == 2 and not any(name in ("a", "b") for name in folders)


def test_a_folder_that_cannot_be_written_to_is_said(serve, tmp_path, caplog):
    server = serve(states=tmp_path / "file")
    http = server.http()
    first = chat(http, "a", max_tokens=5)
    (tmp_path / "file").write_text("")  # where the folder would be
    response = http.post("/v1/states", json={"session": "s", "name": "n"})
    assert response.status_code == 507 and str(tmp_path) not in response.text and "cannot be written" in caplog.text
    assert chat(http, "b", max_tokens=5)["session"]["tokens"] > first["session"]["tokens"]  # it goes on


def wreck(path, how: str, other) -> None:
    raw = path.read_bytes()
    if how == "truncated":
        path.write_bytes(raw[: len(raw) // 2])
    elif how == "tampered":
        path.write_bytes(raw[:-5] + bytes([raw[-5] ^ 1]) + raw[-4:])
    elif how == "no-state":
        path.write_bytes(b"{}")
    else:
        path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("how", ["truncated", "tampered", "no-state", "other-model"])
def test_a_bad_file_is_refused_with_the_reason(serve, tmp_path, how):
    server, other = serve("retnet"), serve("other", states=tmp_path / "theirs")
    for each in (server, other):
        chat(each.http(), "a", max_tokens=5)
        assert each.http().post("/v1/states", json={"session": "s", "name": "n"}).status_code == 200
    (mine,), (theirs,) = (list(each.service.states_folder.rglob("*.safetensors")) for each in (server, other))
    wreck(mine, how, theirs)
    response = server.http().post("/v1/states/n/restore", json={"session": "s"})
    words = {"truncated": "complete", "tampered": "changed", "no-state": "complete", "other-model": "another model"}
    assert response.status_code == 409 and words[how] in response.json()["error"]["message"]
    assert str(tmp_path) not in response.text  # paths are nobody's business
    assert len(server.http().get("/v1/states").json()["data"]) == 1  # to be seen, and deleted
    assert server.http().delete("/v1/states/n").status_code == 200


def test_a_file_that_goes_or_cannot_be_read_is_no_failure(serve, monkeypatch, caplog):
    server = serve()
    http, saved = server.http(), server.service.saved
    chat(http, "a", max_tokens=1)
    assert http.post("/v1/states", json={"session": "s", "name": "n"}).status_code == 200
    [file] = saved.folder.rglob("*.safetensors")

    def unreadable(*_):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr("retentive.serve.sessions.load_memory", unreadable)
    response = http.post("/v1/states/n/restore", json={"session": "t"})
    assert response.status_code == 409 and "the server's log says more" in response.text
    assert "Permission denied" in caplog.text and str(file) not in response.text
    monkeypatch.setattr(saved, "_files", lambda owner: [file, file.with_name("gone.safetensors")])
    assert [state["name"] for state in http.get("/v1/states").json()["data"]] == ["n"]


TRICKS = ["..", ".", "../n", "a/b", "..%2fn", "%2e%2e%2fn", "a%00b", "-n", "a b", "n" * 65, "C:n", "ä", "a\\b"]


@pytest.mark.parametrize("name", TRICKS)
def test_names_that_lead_elsewhere_are_refused(serve, tmp_path, name):
    server = serve()
    http = server.http()
    chat(http, "a", max_tokens=1)
    before = sorted(tmp_path.rglob("*"))
    assert http.post("/v1/states", json={"session": "s", "name": name}).status_code == 400
    assert http.post("/v1/states", json={"session": name, "name": "n"}).status_code == 400
    for method, path in (("POST", f"/v1/states/{name}/restore"), ("DELETE", f"/v1/states/{name}")):
        assert http.request(method, path, json={"session": "t"}).status_code in (400, 404, 405), path
    assert http.get(f"/v1/states/{name}").status_code in (400, 404, 405) or name == "."  # which is the list
    assert http.put(f"/v1/states/{name}", content=b"", headers=FILE).status_code in (400, 404, 405, 409)
    assert http.delete(f"/v1/sessions/{name}").status_code in (400, 404, 405)
    assert sorted(tmp_path.rglob("*")) == before


def test_who_was_silent_longest_goes_first_and_is_told(serve):
    server = serve(sessions=3 * 8300)
    http = server.http()
    for name in ("a", "b", "c"):
        chat(http, "x", name, max_tokens=2)
    chat(http, "x", "a", max_tokens=2)
    chat(http, "x", "d", max_tokens=2)
    assert {name for _, name in server.service.sessions.held} == {"a", "c", "d"}
    gone = http.post(TEXT, json={"prompt": "x", "session": "b"})
    assert gone.status_code == 410 and "evicted" in gone.json()["error"]["message"]
    assert http.delete("/v1/sessions/b").status_code == 200
    assert chat(http, "x", "b", max_tokens=2)["session"]["tokens"] == 20
    assert server.service.sessions.nbytes <= 3 * 8300


def test_an_empty_session_is_not_one(serve):
    server = serve()
    http = server.http()
    assert http.post(TEXT, json={"prompt": "x", "session": "s", "max_tokens": 10**9}).status_code == 400
    assert http.post("/v1/states", json={"session": "s", "name": "n"}).status_code == 404
    assert http.delete("/v1/sessions/s").status_code == 404


def test_a_folder_with_the_name_of_a_state_is_none(serve):
    server = serve()
    http = server.http()
    chat(http, "a", max_tokens=1)
    assert http.post("/v1/states", json={"session": "s", "name": "n"}).status_code == 200
    [file] = server.service.states_folder.rglob("*.safetensors")
    (file.parent / "odd.safetensors").mkdir()
    assert [state["name"] for state in http.get("/v1/states").json()["data"]] == ["n"]
    assert http.delete("/v1/states/odd").status_code == 404


@pytest.fixture
def sessions(shared) -> Sessions:
    """Sessions with 1000 bytes of room, without a server."""
    return Sessions(1000, shared("retnet").service.new_conversation)


def test_a_session_is_checked_out_by_one_at_a_time(sessions):
    with sessions.checkout("o", "s", new=True) as conversation:
        conversation.put_off([1])
        with pytest.raises(Refused, match="answering another request"), sessions.checkout("o", "s"):
            pass
    with sessions.checkout("o", "s") as again:
        assert again is conversation


def test_one_that_is_larger_than_all_the_room_is_evicted_at_once(sessions):
    with sessions.checkout("o", "s", new=True) as conversation:
        conversation.put_off(range(200))
    assert sessions.held == {} and sessions.evictions == 1
    with pytest.raises(Refused, match="evicted"), sessions.checkout("o", "s", new=True):
        pass
    sessions.drop("o", "s")
    with sessions.checkout("o", "s", new=True) as anew:
        assert not anew.begun


def test_names_of_evicted_sessions_do_not_pile_up(sessions):
    for n in range(EVICTED + 10):
        with sessions.checkout("o", f"s{n}", new=True) as conversation:
            conversation.put_off(range(200))
    assert len(sessions.evicted) == EVICTED and ("o", f"s{EVICTED + 9}") in sessions.evicted


def test_what_was_only_put_off_is_kept(sessions):
    """As after a stop string, when the queue has no room to read what came before it."""
    with sessions.checkout("o", "s", new=True) as conversation:
        conversation.put_off([256, 65])
    with sessions.checkout("o", "s") as again:
        assert again.turn([{"role": "user", "content": "b"}])[0][:2] == [256, 65]


def test_many_sessions_at_once_do_not_mix(serve):
    server = serve(slots=3)
    http, got = server.http(), {}

    def talk(n: int) -> None:
        client = server.http()
        got[n] = [chat(client, f"{n} {m}", f"s{n}", max_tokens=6)["choices"][0]["message"]["content"] for m in range(3)]

    threads = [threading.Thread(target=talk, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(8):
        said = b""
        for m in range(3):
            said += f"{'' if m == 0 else chr(10)}User: {n} {m}\nAssistant:".encode()
            text = server.text([*START, *said], max_tokens=6, temperature=0)
            assert got[n][m] == text
            said += text.encode()
    assert http.get("/health").json() == {"status": "ok"} and ByteTokenizer().decode(said)
