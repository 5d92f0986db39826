"""Messages and tools in the body of a chat, as in OpenAI's API."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from retentive.data.tools import NO_PARAMETERS, check_arguments, described
from retentive.serve.errors import Refused


def _as_parts(value: Any) -> Any:
    """Returns a message's `content`, a string or a list of parts, as a list of parts."""
    if not isinstance(value, str | list):
        raise ValueError("expected a string, or a list of parts")
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Body(BaseModel):
    """Base of all bodies: strict, so that "1" is not a number, and without NaN, which is not JSON."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class TextPart(Body):
    type: Literal["text"]
    text: str


class ImageURL(Body):
    url: str


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageURL

    @property
    def encoded(self) -> str:
        return self.image_url.url


class InputAudio(Body):
    data: str
    format: Literal["wav", "flac", "ogg"] = "wav"


class AudioPart(Body):
    type: Literal["input_audio"]
    input_audio: InputAudio

    @property
    def encoded(self) -> str:
        return self.input_audio.data


PARTS = ("text", "image_url", "input_audio")
TYPES = (*PARTS, "message", "function_call", "function_call_output", "item_reference", "reasoning")
"""Types of parts, and of the items of /v1/responses, that choose a class by their `type`."""
Part = Annotated[TextPart | ImagePart | AudioPart, Field(discriminator="type")]


class CalledFunction(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[Part], BeforeValidator(_as_parts), Field(min_length=1)] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    def called(self, field: str) -> dict[str, Any]:
        """Returns what the message says about tools, as templates expect it; `field` is its name in errors.

        Raises:
            Refused: no content where there must be some, calls of another role, or arguments that are no JSON object.
        """
        if self.tool_calls and self.role != "assistant":
            raise Refused(400, "only an assistant's message calls tools", param=f"{field}.tool_calls")
        if self.content is None and not self.tool_calls:
            raise Refused(400, "a message needs content, or an assistant's tool_calls", param=f"{field}.content")
        if self.role == "tool":
            return {"tool_call_id": self.tool_call_id, **({"name": self.name} if self.name else {})}
        calls = []
        for n, call in enumerate(self.tool_calls or ()):
            try:
                arguments = check_arguments(call.function.arguments or "{}")
            except ValueError as error:
                where = f"{field}.tool_calls[{n}].function.arguments"
                raise Refused(400, str(error), param=where, code="invalid_value") from None
            function = {"name": call.function.name, "arguments": arguments}
            calls.append({"id": call.id, "type": "function", "function": function})
        return {"tool_calls": calls} if calls else {}


class Function(Body):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        """JSON schema of the arguments; of an empty object if none is given."""
        return self.function.parameters or NO_PARAMETERS

    def described(self) -> dict[str, Any]:
        """Returns the tool as chat templates expect it."""
        return described(self.function.model_dump())


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


CHOICES = ("none", "auto", "required")


def as_choice(value: Any) -> Any:
    """Returns `tool_choice` if it is a word or names a function, so that an error is one and not one of each kind."""
    function = value.get("function", value) if isinstance(value, dict) else {}  # the newer API has its name beside it
    if value not in CHOICES and not (isinstance(function, dict) and isinstance(function.get("name"), str)):
        raise ValueError(f"expected {', '.join(CHOICES)}, or a function by its name")
    return value


ToolChoice = Annotated[Literal["none", "auto", "required"] | NamedTool, BeforeValidator(as_choice)]


def chosen_tools(tools: Sequence[Tool], choice: ToolChoice | None) -> list[Tool]:
    """Returns the tools that the model may call: all, one by name, or none.

    Raises:
        Refused: two tools have one name, or `choice` needs a tool that is not there.
    """
    names = [tool.function.name for tool in tools]
    if twice := next((n for n, name in enumerate(names) if name in names[:n]), 0):
        raise Refused(400, f"two tools are called {names[twice]!r}", param=f"tools[{twice}].function.name")
    if isinstance(choice, NamedTool):
        found = [tool for tool in tools if tool.function.name == choice.function.name]
        if not found:
            message = f"no tool is called {choice.function.name!r}; there are {', '.join(names) or 'none'}"
            raise Refused(400, message, param="tool_choice")
        return found
    if choice == "required" and not tools:
        raise Refused(400, "tool_choice is required, and tools is empty", param="tool_choice")
    return [] if choice == "none" else list(tools)
