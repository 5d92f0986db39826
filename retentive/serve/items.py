"""Bodies of /v1/responses, OpenAI's newer API: items in, turned into a chat; and items that later requests refer to."""

import json
from collections import OrderedDict
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from retentive.serve.errors import Refused
from retentive.serve.messages import Body, as_choice
from retentive.serve.receive import parse
from retentive.serve.requests import ChatRequest, Name
from retentive.serve.responses import ItemResponses


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


class ReferenceItem(Body):
    """An item of an earlier response, by its id."""

    type: Literal["item_reference"]
    id: str


class ReasoningItem(Body):
    """Thoughts of another model, which are left out."""

    type: Literal["reasoning"]


def _kind(item: Any) -> str:
    """Returns the type of an item; a message may leave it out."""
    return item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[ResultItem, Tag("function_call_output")]
    | Annotated[ReferenceItem, Tag("item_reference")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]
Said = MessageItem | CallItem | ResultItem


class Kept:
    """Items that later requests may refer to: those of a conversation by the id of its last response, and single ones.

    Args:
        most: maximum characters of all of them; the longest unused are dropped first.
    """

    def __init__(self, most: int = 1 << 26):
        self.most, self.size = most, 0
        self.items: OrderedDict[tuple[str, str], tuple[list[Said], int]] = OrderedDict()

    def keep(self, owner: str, id: str, items: list[Said]) -> None:
        """Keeps items under an id, for requests of the same owner."""
        size = sum(len(item.model_dump_json()) for item in items)
        self.items[owner, id], self.size = (items, size), self.size + size
        while self.size > self.most:
            _, (_, dropped) = self.items.popitem(last=False)
            self.size -= dropped

    def of(self, owner: str, id: str, param: str) -> list[Said]:
        """Returns the items under an id; raises Refused (404) if they are not there."""
        if (owner, id) not in self.items:
            message = f"{id!r} is not here: send its items again, or keep the conversation in a session"
            raise Refused(404, message, param=param, code="item_not_found")
        self.items.move_to_end((owner, id))
        return self.items[owner, id][0]


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
    store: bool | None = None

    def as_chat(self, kept: Kept, owner: str) -> "ResponseRequest":
        """Returns the same request as a chat, with the items of `kept` that it refers to.

        Raises:
            Refused: a field that is not served, a value that a chat does not take, or an item that is not there.
        """
        if self.previous_response_id is not None and self.session is not None:
            raise Refused(400, "a session remembers itself: leave out previous_response_id", param="session")
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        items = self._items(kept, owner)
        messages += _joined([item.as_chat() for item in items])
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
        return request.model_copy(update={"echoed_fields": asked, "items": None if self.store is False else items})

    def _items(self, kept: Kept, owner: str) -> list[Said]:
        """Returns all items of the conversation: those of the previous response, and the input's."""
        items = list[Said]()
        if self.previous_response_id is not None:
            items += kept.of(owner, self.previous_response_id, "previous_response_id")
        for n, item in enumerate(self.input):
            if isinstance(item, ReferenceItem):
                items += kept.of(owner, item.id, f"input[{n}].id")
            elif not isinstance(item, ReasoningItem):
                items.append(item)
        return items


class ResponseRequest(ChatRequest):
    prompt_field = "input"
    echoed_fields: dict[str, Any] = Field(default_factory=dict, exclude=True)

    items: list[Any] | None = Field(default=None, exclude=True)
    """Items of the conversation before the answer; None if it shall not be kept."""

    @property
    def echoed(self) -> dict[str, Any]:
        return self.echoed_fields

    def keep(self, kept: Kept, owner: str, response: ItemResponses) -> None:
        """Keeps the items of a finished response, for later requests that refer to it."""
        if self.items is None:
            return
        made = list[Said]()
        if response.text or not response.calls:
            part = InputTextPart(type="output_text", text=response.text)
            made.append(MessageItem(role="assistant", content=[part]))
            kept.keep(owner, response.item_id, made[:1])
        for call in response.calls:
            about = {name: call[name] for name in ("call_id", "name", "arguments")}
            made.append(CallItem(type="function_call", **about))
            kept.keep(owner, call["id"], made[-1:])
        kept.keep(owner, response.id, [*self.items, *made])
