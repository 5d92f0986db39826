"""Bodies of /v1/responses, OpenAI's newer API: items in, turned into a chat."""

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from retentive.serve.errors import Refused
from retentive.serve.messages import Body, as_choice
from retentive.serve.receive import parse
from retentive.serve.requests import ChatRequest, Name


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


class MessageItem(Body):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[Annotated[InputTextPart | InputImagePart, Field(discriminator="type")]],
        BeforeValidator(_as_input_parts),
        Field(min_length=1),
    ]

    def as_chat(self) -> dict[str, Any]:
        return {"role": self.role, "content": [part.as_chat() for part in self.content]}


class CallItem(Body):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str

    def as_chat(self) -> dict[str, Any]:
        """Returns the call in a message of its own; see `_joined`."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"role": "assistant", "tool_calls": [{"id": self.call_id, "function": function}]}


class ResultItem(Body):
    type: Literal["function_call_output"]
    call_id: str
    output: Annotated[list[InputTextPart], BeforeValidator(_as_input_parts), Field(min_length=1)]

    def as_chat(self) -> dict[str, Any]:
        return {"role": "tool", "tool_call_id": self.call_id, "content": [part.as_chat() for part in self.output]}


def _kind(item: Any) -> str:
    """Returns the type of an item; a message may leave it out."""
    return item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[ResultItem, Tag("function_call_output")],
    Discriminator(_kind),
]


def _joined(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the messages with each call in the assistant's message before it: an answer is one message in a chat."""
    joined = list[dict[str, Any]]()
    for message in messages:
        if "tool_calls" in message and joined and joined[-1]["role"] == "assistant":
            joined[-1] = {**joined[-1], "tool_calls": [*joined[-1].get("tool_calls", ()), *message["tool_calls"]]}
        else:
            joined.append(message)
    return joined


class FunctionTool(Body):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def as_chat(self) -> dict[str, Any]:
        return {"type": "function", "function": self.model_dump(exclude={"type"})}


class NamedFunctionTool(Body):
    type: Literal["function"]
    name: str

    def as_chat(self) -> dict[str, Any]:
        return {"type": "function", "function": {"name": self.name}}


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class TextOptions(Body):
    format: TextFormat | None = None


class InputRequest(Body):
    """Body of /v1/responses, which is answered as a chat."""

    model: str | None = None
    input: Annotated[list[Item], BeforeValidator(_as_items), Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    text: TextOptions | None = None
    session: Name | None = None
    seed: int | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: (
        Annotated[Literal["none", "auto", "required"] | NamedFunctionTool, BeforeValidator(as_choice)] | None
    ) = None
    parallel_tool_calls: bool | None = None
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
        messages += _joined([item.as_chat() for item in self.input])
        same = ("model", "temperature", "top_p", "stream", "session", "seed", "parallel_tool_calls")
        body = {name: value for name in same if (value := getattr(self, name)) is not None}
        if self.tools is not None:
            body["tools"] = [tool.as_chat() for tool in self.tools]
        if (choice := self.tool_choice) is not None:
            body["tool_choice"] = choice if isinstance(choice, str) else choice.as_chat()
        if self.max_output_tokens is not None:
            body["max_completion_tokens"] = self.max_output_tokens
        if (form := self.text and self.text.format) and form.type != "text":
            schema = {"json_schema": {"schema": form.json_schema}} if form.json_schema is not None else {}
            body["response_format"] = {"type": form.type, **schema}
        request = parse(ResponseRequest, json.dumps({**body, "messages": messages}).encode())
        asked = self.model_dump(include={"tools", "tool_choice", "parallel_tool_calls"}, exclude_none=True)
        return request.model_copy(update={"echoed_fields": asked})


class ResponseRequest(ChatRequest):
    prompt_field = "input"
    echoed_fields: dict[str, Any] = Field(default_factory=dict, exclude=True)

    @property
    def echoed(self) -> dict[str, Any]:
        return self.echoed_fields
