"""Which requests are refused, how, and that the client hears which field is at fault."""

from http.client import HTTPConnection

import openai
import pytest

from retentive.serve.receive import READ_ON
from tests.serve.asked import CHAT, CHAT_IDS, GREEDY, SAID, TEXT

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
        400, "messages[0].content[0].image_url.url", "Field required",
    ),
    "content-of-another-kind": (
        CHAT, {"messages": [{"role": "user", "content": [{"type": "video", "video": "a"}]}]},
        400, "messages[0].content[0]", "type text, image_url, input_audio",
    ),
    "content-that-nobody-sees": (
        CHAT, {"messages": [{"role": "user", "content": [
            {"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]}]},
        400, "messages[0].content[1]", "this model reads only text: it takes no image_url",
    ),
    "no-prompt": (TEXT, {"max_tokens": 3}, 400, "prompt", "Field required"),
    "prompt-a-number": (TEXT, {"prompt": 5}, 400, "prompt", "expected a string, a list of token ids"),
    "prompt-of-nothing": (TEXT, {"prompt": []}, 400, "prompt", "expected a string, a list of token ids"),
    "prompt-mixed": (TEXT, {"prompt": [1, "a"]}, 400, "prompt", "expected a string, a list of token ids"),
    "echoed-id-outside": (TEXT, {"prompt": [-1], "echo": True}, 400, "prompt", "token ids must be from 0 to 256, got "),
    "id-outside": (TEXT, {"prompt": [257]}, 400, "prompt", "token ids must be from 0 to 256, got "),
    "max-tokens-a-string": (TEXT, {"prompt": "a", "max_tokens": "5"}, 400, "max_tokens", "valid integer"),
    "max-tokens-true": (TEXT, {"prompt": "a", "max_tokens": True}, 400, "max_tokens", "valid integer"),
    "max-tokens-negative": (TEXT, {"prompt": "a", "max_tokens": -1}, 400, "max_tokens", "greater than or equal to 0"),
    "max-tokens-too-many": (TEXT, {"prompt": "a", "max_tokens": 501}, 400, "max_tokens", "at most 500"),
    "temperature-hot": (TEXT, {"prompt": "a", "temperature": 2.1}, 400, "temperature", "less than or equal to 2"),
    "temperature-a-string": (TEXT, {"prompt": "a", "temperature": "hot"}, 400, "temperature", "valid number"),
    "n-zero": (TEXT, {"prompt": "a", "n": 0}, 400, "n", "greater than or equal to 1"),
    "n-beyond-the-slots": (TEXT, {"prompt": "a", "n": 9}, 400, "n", "n must be from 1 to 8, this server's slots"),
    "stop-empty": (TEXT, {"prompt": "a", "stop": ""}, 400, "stop[0]", "at least 1 character"),
    "stop-a-number": (TEXT, {"prompt": "a", "stop": 3}, 400, "stop", "valid array"),
    "stop-long": (TEXT, {"prompt": "a", "stop": "b" * 257}, 400, "stop[0]", "at most 256 characters"),
    "stops-many": (TEXT, {"prompt": "a", "stop": ["b"] * 17}, 400, "stop", "at most 16 items"),
    "bias-long": (TEXT, {"prompt": "a", "logit_bias": {str(n): 1 for n in range(1025)}}, 400, "logit_bias", "1024"),
    "bias-of-a-word": (TEXT, {"prompt": "a", "logit_bias": {"a": 1}}, 400, "logit_bias", "must be token ids"),
    "bias-too-much": (TEXT, {"prompt": "a", "logit_bias": {"1": 101}}, 400, "logit_bias.1", "equal to 100"),
    "bias-outside": (TEXT, {"prompt": "a", "logit_bias": {"300": 1}}, 400, "logit_bias", "in [0, 257), got 300"),
    "seed-a-float": (TEXT, {"prompt": "a", "seed": 1.5}, 400, "seed", "valid integer"),
    "logprobs-too-many": (TEXT, {"prompt": "a", "logprobs": 21}, 400, "logprobs", "less than or equal to 20"),
    "top-logprobs-alone": (CHAT, {"messages": SAID, "top_logprobs": 2}, 400, "top_logprobs", "needs logprobs"),
    "best-of": (TEXT, {"prompt": "a", "best_of": 3}, 400, "best_of", "not served"),
    "suffix": (TEXT, {"prompt": "a", "suffix": "b"}, 400, "suffix", "not served"),
    "tools": (CHAT, {"messages": SAID, "tools": [{"type": "function"}]}, 400, "tools[0].function", "Field required"),
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
    "prompt-too-long": (TEXT, {"prompt": "a" * 2000}, 400, "prompt", "has 2001 tokens, this server takes 2000"),
    "messages-too-long": (
        CHAT, {"messages": [{"role": "user", "content": "a" * 2000}]}, 400, "messages", "this server takes 2000",
    ),
    "echo-too-much": (
        TEXT, {"prompt": ["a" * 1600] * 8, "echo": True, "logprobs": 20, "max_tokens": 0}, 400, "logprobs",
        "an echo has at most 262144 log probabilities, this one would have 268800",
    ),
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
    "a-list": (b"[1]", "the body: Input should be an object"),
    "null": (b"null", "the body: Input should be an object"),
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
    response = retnet.http().post(TEXT, json={"prompt": "a", **nothing, "seed": 1, "store": True, "colour": "blue"})
    assert response.status_code == 200 and response.json()["usage"]["completion_tokens"] == 16


def test_bodies_must_be_json_and_not_too_large(retnet):
    most = retnet.service.options.most_body
    http = retnet.http()
    # what a page of another origin may send without asking
    assert http.post(TEXT, content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"}).status_code == 415
    packed = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    response = http.post(TEXT, content=b"\x1f\x8b", headers=packed)
    assert response.status_code == 415 and "Content-Encoding: gzip" in response.json()["error"]["message"]
    large = b'{"prompt": "' + b"a" * most + b'"}'
    response = http.post(TEXT, content=large, headers={"Content-Type": "application/json"})
    assert response.status_code == 413 and str(most) in response.json()["error"]["message"]

    def parts():  # no Content-Length
        for _ in range(most // 1000 + 2):
            yield b"a" * 1000

    assert http.post(TEXT, content=parts(), headers={"Content-Type": "application/json"}).status_code == 413


def test_a_client_that_sends_before_it_reads_hears_that_the_body_is_too_large(retnet):
    most = retnet.service.options.most_body
    sender = HTTPConnection(retnet.url.removeprefix("http://"), timeout=20)
    sender.request("POST", TEXT, b"a" * (READ_ON - 1) * most, {"Content-Type": "application/json"})
    with sender.getresponse() as response:
        assert response.status == 413 and b"larger than" in response.read()
    # nor is anything read where the head says that it is not worth it
    sender.putrequest("POST", TEXT)
    for name, value in (("Content-Type", "application/json"), ("Content-Length", READ_ON * most + 1)):
        sender.putheader(name, str(value))
    sender.endheaders()
    with sender.getresponse() as response:
        assert response.status == 413
    sender.close()


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


def test_content_in_parts_is_joined(server):
    parts = [{"type": "text", "text": "Who is"}, {"type": "text", "text": " there?"}]
    reply = server.client().chat.completions.create(
        model=server.service.name, messages=[{"role": "user", "content": parts}], max_tokens=10, **GREEDY
    )
    assert reply.choices[0].message.content == server.text(CHAT_IDS, max_tokens=10, **GREEDY)
