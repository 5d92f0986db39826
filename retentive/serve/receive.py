"""Bodies of HTTP requests: received within limits of time and size, and parsed."""

import asyncio
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest

from retentive.serve.errors import Refused, field
from retentive.serve.messages import PARTS, TYPES
from retentive.serve.options import Options

BODY_SECONDS = 60
"""Maximum seconds for a body to arrive, if the server's time-out is not shorter."""
READ_ON = 16
"""Multiple of the limit up to which a body is read to its end, so that a client still uploading receives the 413."""
CLOSE = {"Connection": "close"}
"""Header of responses that leave the rest of a request unread, so that a client cannot send forever."""

T = TypeVar("T", bound=BaseModel)


async def receive(http: HTTPRequest, kind: type[T], options: Options, *, media: bool = False) -> T:
    """Returns the request in the body of an HTTP request, which may be larger with pictures and sound (`media`).

    Raises:
        Refused: 400 with the field at fault; 408 too slow; 413 too large; 415 not JSON by its headers, or compressed.
    """
    most = options.most_body + (options.most_media if media else 0)
    return parse(kind, await _received(http, options, most, "application/json"))


async def receive_file(http: HTTPRequest, options: Options, most: int) -> bytes:
    """Returns the file in the body of an HTTP request, of at most `most` bytes; raises Refused as `receive`."""
    return await _received(http, options, most, "application/octet-stream")


async def _received(http: HTTPRequest, options: Options, most: int, kind: str) -> bytes:
    # CSRF: a page of another origin can post forms and plain text without a preflight, but not these types.
    said = http.headers.get("content-type", "").split(";")[0].strip().lower()
    if said != kind:
        raise Refused(415, f"expected Content-Type: {kind}, got {said or 'none'}")
    if (encoding := http.headers.get("content-encoding", "identity").strip().lower()) != "identity":
        raise Refused(415, f"bodies are taken as they are, without Content-Encoding: {encoding}")
    seconds = min(BODY_SECONDS, options.timeout)
    try:
        return await asyncio.wait_for(_body(http, most), seconds)
    except asyncio.TimeoutError:
        raise Refused(408, f"the body did not come within {seconds:g} s", headers=CLOSE) from None
    except ClientDisconnect:
        raise Refused(499, "the client left") from None


async def _body(http: HTTPRequest, most: int) -> bytes:
    """Returns the body, with at most `most` bytes in memory; raises Refused (413)."""
    too_large = Refused(413, f"the body is larger than {most} bytes", code="body_too_large", headers=CLOSE)
    said = http.headers.get("content-length", "")  # as announced; a chunked body announces nothing
    if said.isdecimal() and int(said) > READ_ON * most:
        raise too_large
    body, size = bytearray(), 0
    async for part in http.stream():
        size += len(part)
        if size > READ_ON * most:
            raise too_large
        if size <= most:
            body += part
    if size > most:
        raise too_large
    return bytes(body)


def parse(kind: type[T], body: bytes) -> T:
    """Returns the request in a JSON body.

    Raises:
        Refused: 400, naming the invalid field.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    # pydantic's path holds the type of a part or an item where that has chosen the class; it is no field of the body
    where = [
        at for n, at in enumerate(first["loc"]) if not (n and isinstance(first["loc"][n - 1], int) and at in TYPES)
    ]
    param, said = field(where), first["msg"].removeprefix("Value error, ")
    if first["type"].startswith("union_tag"):  # a part without a type, or a part or item of an unknown one
        types = first.get("ctx", {}).get("expected_tags", ", ".join(PARTS)).replace("'", "")
        said = f"expected {'a part' if PARTS[0] in types else 'an item'} of type {types}"
    if first["type"] == "json_invalid":
        raise Refused(400, f"the body is not JSON: {said.removeprefix('Invalid JSON: ')}", code="invalid_json")
    raise Refused(400, f"{param or 'the body'}: {said}", param=param or None, code="invalid_value")
