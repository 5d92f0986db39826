"""What the tests ask of servers, and what the plain template makes of it."""

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
START = [256]
"""What a text begins with: the end of another."""
SAID = [{"role": "user", "content": "Who is there?"}]
CHAT_IDS = [*START, *b"User: Who is there?\nAssistant:"]
"""What the plain template makes of SAID."""
GREEDY, DRAWN = {"temperature": 0}, {"temperature": 0.9, "top_p": 0.95, "seed": 7}
ENDLESS = {"prompt": "a", "max_tokens": 10**6, "logit_bias": {"256": -100}}
