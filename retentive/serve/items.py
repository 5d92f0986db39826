"""Bodies of /v1/responses, OpenAI's newer API: items in, turned into a chat."""

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from retentive.serve.errors import Refused
from retentive.serve.requests import Body, ChatRequest, Name, parse


def _as_input_parts(value: Any) -> Any:
    """Returns an item's `content`, a string or a list of parts, as a list of parts."""
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


def _as_items(value: Any) -> Any:
    """Returns `input`, a text of the user or a list of items, as a list of items."""
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class InputTextPart(Body):
    type: Literal["input_text", "output_text"]
    text: str

    def as_chat(self) -> dict[str, Any]:
        return {"type": "text", "text": self.text}


class InputImagePart(Body):
    type: Literal["input_image"]
    image_url: str

    def as_chat(self) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": self.image_url}}


class InputItem(Body):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[Annotated[InputTextPart | InputImagePart, Field(discriminator="type")]],
        BeforeValidator(_as_input_parts),
        Field(min_length=1),
    ]

    def as_chat(self) -> dict[str, Any]:
        return {"role": self.role, "content": [part.as_chat() for part in self.content]}


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class TextOptions(Body):
    format: TextFormat | None = None


class InputRequest(Body):
    """Body of /v1/responses, which is answered as a chat."""

    model: str | None = None
    input: Annotated[list[InputItem], BeforeValidator(_as_items), Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    text: TextOptions | None = None
    session: Name | None = None
    seed: int | None = None
    tools: list[Any] | None = None
    previous_response_id: str | None = None

    def as_chat(self) -> "ResponseRequest":
        """Returns the same request as a chat.

        Raises:
            Refused: a field that is not served, or a value that a chat does not take.
        """
        if self.previous_response_id is not None:
            message = "previous_response_id is not served: keep the conversation in a session"
            raise Refused(400, message, param="previous_response_id")
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        messages += [item.as_chat() for item in self.input]
        same = ("model", "temperature", "top_p", "stream", "session", "seed", "tools")
        body = {name: value for name in same if (value := getattr(self, name)) is not None}
        if self.max_output_tokens is not None:
            body["max_completion_tokens"] = self.max_output_tokens
        if (form := self.text and self.text.format) and form.type != "text":
            schema = {"json_schema": {"schema": form.json_schema}} if form.json_schema is not None else {}
            body["response_format"] = {"type": form.type, **schema}
        return parse(ResponseRequest, json.dumps({**body, "messages": messages}).encode())


class ResponseRequest(ChatRequest):
    prompt_field = "input"
