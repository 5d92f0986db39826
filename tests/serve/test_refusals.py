"""What is refused, how, and that the client hears which field is at fault; and who is let in."""

import socket
from contextlib import ExitStack

import openai
import pytest

from retentive.serve.options import Options

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SAID = [{"role": "user", "content": "hi"}]

FIELDS = {
    # name: (path, body, status, param, words)
    "no-messages": (CHAT, {}, 400, "messages", "Field required"),
    "empty-messages": (CHAT, {"messages": []}, 400, "messages", "at least 1 item"),
    "messages-a-string": (CHAT, {"messages": "hi"}, 400, "messages", "valid array"),
    "unknown-role": (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages[0].role", "'system'"),
    "content-a-number": (
        CHAT, {"messages": [*SAID, {"role": "user", "content": 5}]}, 400, "messages[1].content", "string",
    ),
    "content-a-picture": (
        CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        400, "messages[0].content", "only text",
    ),
    "no-prompt": (TEXT, {"max_tokens": 3}, 400, "prompt", "Field required"),
    "prompt-a-number": (TEXT, {"prompt": 5}, 400, "prompt", "expected a string, a list of token ids"),
    "prompt-of-nothing": (TEXT, {"prompt": []}, 400, "prompt", "expected a string, a list of token ids"),
    "prompt-mixed": (TEXT, {"prompt": [1, "a"]}, 400, "prompt", "expected a string, a list of token ids"),
    "id-outside": (TEXT, {"prompt": [257]}, 400, None, "token ids must be in [0, 257)"),
    "max-tokens-a-string": (TEXT, {"prompt": "a", "max_tokens": "5"}, 400, "max_tokens", "valid integer"),
    "max-tokens-true": (TEXT, {"prompt": "a", "max_tokens": True}, 400, "max_tokens", "valid integer"),
    "max-tokens-negative": (TEXT, {"prompt": "a", "max_tokens": -1}, 400, "max_tokens", "greater than or equal to 0"),
    "max-tokens-too-many": (TEXT, {"prompt": "a", "max_tokens": 501}, 400, "max_tokens", "at most 500"),
    "temperature-hot": (TEXT, {"prompt": "a", "temperature": 2.1}, 400, "temperature", "less than or equal to 2"),
    "temperature-a-string": (TEXT, {"prompt": "a", "temperature": "hot"}, 400, "temperature", "valid number"),
    "top-p-zero": (TEXT, {"prompt": "a", "top_p": 0}, 400, "top_p", "greater than 0"),
    "n-zero": (TEXT, {"prompt": "a", "n": 0}, 400, "n", "greater than or equal to 1"),
    "n-beyond-the-slots": (TEXT, {"prompt": "a", "n": 9}, 400, None, "n must be from 1 to the engine's 8 slots"),
    "stop-empty": (TEXT, {"prompt": "a", "stop": ""}, 400, "stop[0]", "at least 1 character"),
    "stop-a-number": (TEXT, {"prompt": "a", "stop": 3}, 400, "stop", "valid array"),
    "stop-long": (TEXT, {"prompt": "a", "stop": "b" * 257}, 400, "stop[0]", "at most 256 characters"),
    "stops-many": (TEXT, {"prompt": "a", "stop": ["b"] * 17}, 400, "stop", "at most 16 items"),
    "bias-long": (TEXT, {"prompt": "a", "logit_bias": {str(n): 1 for n in range(1025)}}, 400, "logit_bias", "1024"),
    "bias-of-a-word": (TEXT, {"prompt": "a", "logit_bias": {"a": 1}}, 400, "logit_bias", "must be token ids"),
    "bias-too-much": (TEXT, {"prompt": "a", "logit_bias": {"1": 101}}, 400, "logit_bias.1", "equal to 100"),
    "bias-outside": (TEXT, {"prompt": "a", "logit_bias": {"300": 1}}, 400, None, "bias is for tokens in [0, 257)"),
    "seed-a-float": (TEXT, {"prompt": "a", "seed": 1.5}, 400, "seed", "valid integer"),
    "logprobs-too-many": (TEXT, {"prompt": "a", "logprobs": 21}, 400, "logprobs", "less than or equal to 20"),
    "top-logprobs-alone": (CHAT, {"messages": SAID, "top_logprobs": 2}, 400, "top_logprobs", "needs logprobs"),
    "best-of": (TEXT, {"prompt": "a", "best_of": 3}, 400, "best_of", "not served"),
    "suffix": (TEXT, {"prompt": "a", "suffix": "b"}, 400, "suffix", "not served"),
    "tools": (CHAT, {"messages": SAID, "tools": [{"type": "function"}]}, 400, "tools", "not served"),
    "presence-penalty": (TEXT, {"prompt": "a", "presence_penalty": 1}, 400, "presence_penalty", "not served"),
    "frequency-penalty": (TEXT, {"prompt": "a", "frequency_penalty": 1}, 400, "frequency_penalty", "not served"),
    "format-unknown": (TEXT, {"prompt": "a", "response_format": {"type": "x"}}, 400, "response_format.type", "'text'"),
    "format-without-schema": (
        TEXT, {"prompt": "a", "response_format": {"type": "json_schema"}},
        400, "response_format.json_schema", "missing",
    ),
    "session-a-path": (TEXT, {"prompt": "a", "session": "../x"}, 400, "session", "pattern"),
    "session-twice": (TEXT, {"prompt": "a", "session": "s", "n": 2}, 400, "n", "one way"),
    "unknown-model": (TEXT, {"prompt": "a", "model": "gpt-9"}, 404, "model", "this server has 'retnet'"),
    "prompt-too-long": (TEXT, {"prompt": "a" * 2000}, 400, None, "the prompt has 2001 tokens, this server takes 2000"),
    "too-many-prompts": (TEXT, {"prompt": ["a"] * 65}, 400, "prompt", "65 prompts in a request"),
}  # fmt: skip


@pytest.mark.parametrize("case", FIELDS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_bad_field_is_named(retnet, case, stream):
    path, body, status, param, words = FIELDS[case]
    before = set(retnet.service.sessions.held)
    response = retnet.http().post(path, json={**body, "stream": stream})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param)
    assert words in error["message"] and "\n" not in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert retnet.service.in_flight == 0 and set(retnet.service.sessions.held) == before


BODIES = {
    "nothing": (b"", "not JSON"),
    "half": (b'{"prompt": "a', "not JSON"),
    "not-utf8": (b'{"prompt": "\xff"}', "not JSON"),
    "half-a-character": (b'{"prompt": "\\ud800"}', "not JSON"),
    "a-list": (b"[1]", "object"),
    "deep": (b'{"prompt": ' + b"[" * 20_000, "not JSON"),
    "not-a-number": (b'{"prompt": "a", "temperature": NaN}', "temperature"),
    "a-huge-number": (b'{"prompt": "a", "seed": 1' + b"0" * 400 + b"}", "seed"),
}


@pytest.mark.parametrize("case", BODIES)
def test_a_bad_body_is_refused(retnet, case):
    body, words = BODIES[case]
    response = retnet.http().post(TEXT, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and words in response.json()["error"]["message"]


def test_null_is_as_good_as_nothing_and_unknown_fields_are_ignored(retnet):
    nothing = dict.fromkeys(["max_tokens", "temperature", "stop", "n", "logit_bias", "stream", "logprobs", "user"])
    response = retnet.http().post(TEXT, json={"prompt": "a", **nothing, "store": True, "colour": "blue"})
    assert response.status_code == 200 and response.json()["usage"]["completion_tokens"] == 16


def test_bodies_must_be_json_and_not_too_large(retnet):
    most = retnet.service.options.most_body
    http = retnet.http()
    # what a page of another origin may send without asking
    assert http.post(TEXT, content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"}).status_code == 415
    large = b'{"prompt": "' + b"a" * most + b'"}'
    response = http.post(TEXT, content=large, headers={"Content-Type": "application/json"})
    assert response.status_code == 413 and str(most) in response.json()["error"]["message"]

    def parts():  # no Content-Length
        for _ in range(most // 1000 + 2):
            yield b"a" * 1000

    assert http.post(TEXT, content=parts(), headers={"Content-Type": "application/json"}).status_code == 413


def test_errors_are_the_official_clients_exceptions(retnet, serve):
    client = retnet.client()
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="retnet", prompt="a" * 3000)
    assert bad.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=SAID)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")
    server = serve(api_key=("right",))
    with pytest.raises(openai.AuthenticationError) as wrong:
        server.client("wrong").models.list()
    assert wrong.value.code == "invalid_api_key"
    assert [m.id for m in server.client("right").models.list()] == ["retnet"]


def test_a_full_queue_is_told_to_come_again(serve):
    server = serve(slots=1, queue=1, max_tokens=100_000)
    http, body = server.http(), {"prompt": "a", "max_tokens": 100_000, "stream": True, "logit_bias": {"256": -100}}
    with ExitStack() as open:
        first = open.enter_context(http.stream("POST", TEXT, json=body))
        lines = first.iter_lines()
        next(lines)  # it has its slot
        second = open.enter_context(http.stream("POST", TEXT, json=body))
        assert first.status_code == second.status_code == 200
        refused = http.post(TEXT, json={"prompt": "b"})
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        with pytest.raises(openai.RateLimitError):
            server.client().completions.create(model="retnet", prompt="b")
        refused = http.post(TEXT, json={"prompt": ["b"]})
        assert refused.json()["error"]["code"] == "queue_full"
    assert server.idle()
    assert http.post(TEXT, json={"prompt": "b"}).status_code == 200


def test_some_of_many_prompts_do_not_linger_when_the_rest_is_refused(serve):
    server = serve(slots=1, queue=2)
    body = {"prompt": "a", "max_tokens": 4000, "stream": True, "logit_bias": {"256": -100}}
    http = server.http()
    with http.stream("POST", TEXT, json=body) as first:
        lines = first.iter_lines()
        next(lines)
        with http.stream("POST", TEXT, json=body):  # one waits, so there is room for one more, not two
            assert http.post(TEXT, json={"prompt": ["b", "c"]}).status_code == 429
    assert server.idle()


def test_time_is_bounded(serve):
    server = serve(timeout=0.5, max_tokens=10**6)
    body = {"prompt": "a", "max_tokens": 10**6, "logit_bias": {"256": -100}}
    response = server.http().post(TEXT, json=body)
    assert response.status_code == 504 and response.json()["error"]["code"] == "timeout"
    with (
        pytest.raises(openai.APIError, match=r"more than this server's 0\.5 s"),
        server.client().completions.create(model="retnet", stream=True, **body) as chunks,
    ):
        for _ in chunks:
            continue
    assert server.idle()


KEYS = {"none": (None, 401), "wrong": ("Bearer c", 401), "basic": ("Basic a", 401), "bare": ("a", 401),
        "first": ("Bearer a", 200), "second": ("bearer b", 200), "part": ("Bearer", 401)}  # fmt: skip


def test_keys(serve):
    server = serve(api_key=("a", "b"))
    http = server.http()
    for name, (header, status) in KEYS.items():
        headers = {} if header is None else {"Authorization": header}
        for path in ("/v1/models", "/v1/info", "/v1/states", "/metrics"):
            assert http.get(path, headers=headers).status_code == status, (name, path)
        assert http.post(CHAT, json={"messages": SAID, "max_tokens": 1}, headers=headers).status_code == status
    for path in ("/health", "/"):
        assert http.get(path).status_code == 200
    assert http.get("/v1/models").headers["www-authenticate"] == "Bearer"


def test_pages_of_other_origins_are_kept_out_unless_named(retnet, serve):
    asks = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in retnet.http().options(CHAT, headers=asks).headers
    assert "access-control-allow-origin" not in retnet.http().get("/v1/models", headers=asks).headers
    server = serve(cors=("https://example.org",), api_key=("a",))
    allowed = server.http().options(CHAT, headers={**asks, "Access-Control-Request-Headers": "authorization"})
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://example.org"
    asks["Origin"] = "https://example.com"
    assert "access-control-allow-origin" not in server.http().options(CHAT, headers=asks).headers


HOSTS = {"evil.example.org": 403, "evil.example.org:8000": 403, "127.0.0.1:8000": 200, "localhost": 200}
HOSTS |= {"[::1]:8000": 200, "192.168.1.5": 200, "retentive:8000": 200}


@pytest.mark.parametrize("host", HOSTS)
def test_without_keys_a_name_of_the_web_does_not_lead_in(retnet, host):
    assert retnet.http().get("/v1/models", headers={"Host": host}).status_code == HOSTS[host]


def test_places_that_are_not_there(retnet):
    http = retnet.http()
    for path in ("/docs", "/openapi.json", "/v1/nothing", "/app.py", "/..%2f..%2fapp.py", "/.git", "/page/app.js"):
        response = http.get(path)
        assert response.status_code == 404 and response.json()["error"]["type"] == "not_found_error", path
    assert http.get(CHAT).status_code == 405


def test_a_raw_path_does_not_leave_the_page(retnet):
    host, port = retnet.url.removeprefix("http://").split(":")
    for path in ("/../app.py", "/%2e%2e/app.py", "//etc/passwd", "/page/../../app.py"):
        with socket.create_connection((host, int(port)), timeout=10) as raw:
            raw.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            assert b" 404 " in raw.recv(1000).split(b"\r\n")[0], path


def test_options_that_make_no_sense(refuses):
    for options, words in (
        (dict(slots=0), "--slots must be above 0, got 0"),
        (dict(max_prompt=-1), "--max-prompt must be above 0, got -1"),
        (dict(timeout=float("nan")), "--timeout must be above 0"),
        (dict(cache=-1), "--cache must be at least 0"),
        (dict(api_key=("",)), "an API key must be printable"),
        (dict(api_key=("a\nb",)), "an API key must be printable"),
    ):
        with refuses(words):
            Options(**options)


def test_no_secret_is_told(serve, capfd):
    server = serve(api_key=("sesame-1234",))
    server.http("sesame-1234").post(TEXT, json={"prompt": "a", "max_tokens": 1})
    server.http("sesame-12345").post(TEXT, json={"prompt": "a", "max_tokens": 1})
    metrics = server.http("sesame-1234").get("/metrics").text
    assert 'retentive_requests_total{path="/v1/completions",status="401"} 1.0' in metrics
    assert 'retentive_requests_total{path="/v1/completions",status="200"} 1.0' in metrics
    shown = capfd.readouterr()
    assert "sesame" not in metrics + shown.out + shown.err
