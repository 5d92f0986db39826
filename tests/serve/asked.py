"""Requests of the tests, and the prompts that the plain template makes of them."""

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
START = [256]
"""Start of a text: the end of another."""
SAID = [{"role": "user", "content": "Who is there?"}]
CHAT_IDS = [*START, *b"User: Who is there?\nAssistant:"]
"""Prompt that the plain template makes of SAID."""
GREEDY, DRAWN = {"temperature": 0}, {"temperature": 0.9, "top_p": 0.95, "seed": 7}
ENDLESS = {"prompt": "a", "max_tokens": 10**6, "logit_bias": {"256": -100}}
