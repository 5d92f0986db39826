"""The form of what clients get, where the official client does not look."""

from tests.serve.asked import GREEDY


def test_a_streamed_completion_ends_as_openai_does(server):
    body = {"prompt": "Once", "max_tokens": 9, "stream": True, **GREEDY}
    with server.http().stream("POST", "/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: {") for line in lines[:-1]) and lines[-1] == "data: [DONE]"
