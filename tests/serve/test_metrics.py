"""The figures for Prometheus, against requests whose tokens are known."""

from tests.serve.asked import CHAT, TEXT


def test_the_metrics(serve):
    server = serve(slots=3)
    http = server.http()
    for prompt in ("a" * 600, "a" * 600):
        assert http.post(TEXT, json={"prompt": prompt, "max_tokens": 7, "temperature": 0}).status_code == 200
    http.post(TEXT, json={"prompt": 3})
    http.post(
        CHAT, json={"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "session": "s", "temperature": 0}
    )
    lines = dict(line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines() if not line.startswith("#"))
    figures = {name: float(value) for name, value in lines.items()}
    assert figures['retentive_requests_total{path="/v1/completions",status="200"}'] == 2
    assert figures['retentive_requests_total{path="/v1/completions",status="400"}'] == 1
    assert figures["retentive_slots"] == 3 and figures["retentive_running"] == figures["retentive_queue_length"] == 0
    assert figures["retentive_generated_tokens_total"] == 17
    assert figures["retentive_cached_tokens_total"] == 600 and figures["retentive_cache_hits_total"] == 1
    assert figures["retentive_time_to_first_token_seconds_count"] == 3
    assert figures["retentive_time_per_token_seconds_count"] == 3
    assert 0 < figures["retentive_time_to_first_token_seconds_sum"] < figures["retentive_request_seconds_sum"]
    assert figures["retentive_sessions"] == 1 and figures["retentive_session_bytes"] > 8000
    assert figures["retentive_pool_bytes"] > 3 * 8000 and figures["retentive_cache_bytes"] > 0
