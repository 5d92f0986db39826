"""Errors as OpenAI's clients read them: what a client did wrong, or the server cannot do now."""

from collections.abc import Mapping, Sequence
from typing import Any

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
"""OpenAI's error types by status, where it is not the general one."""


class Refused(Exception):
    """Raised anywhere in the server; answered with `status` and a message of one line.

    Args:
        param: the field at fault, such as `messages[0].content`.
        code: a word for programs, such as `context_length_exceeded`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, " ".join(message.split()), param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body of the answer."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def try_later(message: str, *, status: int = 429, seconds: int = 1) -> Refused:
    """A refusal because there is no room now; OpenAI's clients try again by themselves after `seconds`."""
    code = "queue_full" if status == 429 else "draining"
    return Refused(status, message, code=code, headers={"Retry-After": str(seconds)})


def field(location: Sequence[int | str]) -> str:
    """The path to a field of a JSON body as people write it: messages[0].content."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
