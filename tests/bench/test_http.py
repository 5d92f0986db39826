"""The server's part of `bench serving`: small and whole, and a reply that is not the model's own is seen."""

import pytest

pytest.importorskip("fastapi", reason="the server needs pip install 'retentive[serve]'")

from retentive.bench import http
from retentive.data.tokenizer import train_bpe
from retentive.models import RetNetConfig, build

CONFIG = RetNetConfig(vocab_size=300, dim=32, layers=1, heads=2)


def test_the_streams_are_timed_beside_the_engine():
    said = []
    result = http.measure(build(CONFIG).eval(), 3, 10, repeats=2, say=said.append)
    assert set(result["tokens_per_second"]) == {"engine", "server"} and result["server_over_engine"] > 0
    assert len(said) == 2


def test_another_text_is_not_timed():
    model, tokenizer = build(CONFIG).eval(), train_bpe(["to be or not to be " * 30], 300)
    asked = http.requests(model, tokenizer, 2, 8)
    assert len({text for _, text in asked}) == 2
    with http.server(model, tokenizer, 2) as port:
        assert http.through_server(port, asked) > 0
        with pytest.raises(ArithmeticError, match="stream 1 through the server gave another text"):
            http.through_server(port, [asked[0], (asked[1][0], "what it did not write")])
        bad = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        with pytest.raises(ArithmeticError, match="415 Unsupported Media Type"):
            http.through_server(port, [(bad, "")])
