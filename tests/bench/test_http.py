"""The client of `bench serving --server`: a reply that is not the model's own is seen, and what is not a reply."""

import pytest

pytest.importorskip("fastapi", reason="the server needs pip install 'retentive[serve]'")

from retentive.bench import http
from retentive.bench.lab.server import server
from retentive.bench.serving import prompts
from retentive.data.tokenizer import train_bpe
from retentive.models import build, retnet

CONFIG = retnet(vocab_size=300, dim=32, layers=1, heads=2)


def test_another_text_is_not_timed():
    model, tokenizer = build(CONFIG).eval(), train_bpe(["to be or not to be " * 30], 300)
    asked = http.requests(model, tokenizer, prompts(model, 2, 2), 8)
    assert len({text for _, text in asked}) == 2
    with server(model, tokenizer, "--slots", "2", "--cache", "0") as (_, port):
        assert http.through_server(port, asked) > 0
        with pytest.raises(ArithmeticError, match="stream 1 through the server gave another text"):
            http.through_server(port, [asked[0], (asked[1][0], "what it did not write")])
        bad = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        with pytest.raises(ArithmeticError, match="415 Unsupported Media Type"):
            http.through_server(port, [(bad, "")])
