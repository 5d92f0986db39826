"""What clients send: the fields of OpenAI's requests that are served here, and ours beside them, checked by type.

Fields that are not known are ignored, as OpenAI's server does; known ones that are not served are refused, by name.
"""

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from retentive.infer import SamplingParams
from retentive.serve.errors import Refused, field
from retentive.serve.options import NAME

COLDEST = 1e-4
"""Below this temperature the likeliest token is taken: dividing by less would overflow."""

Name = Annotated[str, Field(pattern=NAME)]
T = TypeVar("T", bound=BaseModel)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_prompts(value: Any) -> Any:
    """A text, ids, or a list of either, as a list of texts and ids."""
    prompts = [value] if isinstance(value, str) or (isinstance(value, list) and _are_ids(value)) else value
    if not isinstance(prompts, list) or not prompts:
        raise ValueError("expected a string, a list of token ids, or a list of either")
    for prompt in prompts:
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and _are_ids(prompt)):
            raise ValueError("expected a string, a list of token ids, or a list of either")
    return prompts


def _are_ids(value: list) -> bool:
    return bool(value) and all(type(i) is int for i in value)


def _as_text(value: Any) -> Any:
    """A message's content: a string, or parts that are text."""
    if not isinstance(value, list):
        return value
    if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in value):
        raise ValueError("expected a string or parts of type text: only text is understood here")
    return "".join(part["text"] for part in value)


class Wire(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


# what every token is held against must be little, or one request would take the time of all
Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=256)]], BeforeValidator(_as_list), Field(max_length=16)
]
Bias = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)]


class StreamOptions(Wire):
    include_usage: bool = False


class Schema(Wire):
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]


class ResponseFormat(Wire):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None


class Message(Wire):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_as_text)]


class Generation(Wire, ABC):
    """What both kinds of completion take. null is as good as not given."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    stop: Stops | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    logit_bias: Bias | None = None
    seed: Annotated[int, Field(ge=-(2**62), le=2**62)] | None = None
    response_format: ResponseFormat | None = None
    session: Name | None = None

    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    @property
    @abstractmethod
    def logprob_count(self) -> int | None:
        """So many likeliest tokens are to come with each; None for no log probabilities."""

    def refuse_what_is_not_served(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            if getattr(self, name):
                raise Refused(400, f"{name} is not served: use repetition_penalty", param=name)
        if self.session is not None and (self.n or 1) > 1:
            raise Refused(400, "a session goes on in one way: n must be 1", param="n")

    def sampling(self) -> SamplingParams:
        temperature = 1.0 if self.temperature is None else self.temperature
        return SamplingParams(
            temperature=temperature if temperature >= COLDEST else 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            bias=self._bias(),
            seed=self.seed,
        )

    def _bias(self) -> dict[int, float]:
        try:
            return {int(token): value for token, value in (self.logit_bias or {}).items()}
        except ValueError:
            raise Refused(400, "the keys of logit_bias must be token ids", param="logit_bias") from None


class CompletionRequest(Generation):
    prompt: Annotated[list[str | list[int]], BeforeValidator(_as_prompts)]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = None
    suffix: str | None = None

    @property
    def logprob_count(self) -> int | None:
        return self.logprobs

    def refuse_what_is_not_served(self) -> None:
        super().refuse_what_is_not_served()
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise Refused(400, "best_of is not served: ask for n and choose", param="best_of")
        if self.suffix:
            raise Refused(400, "suffix is not served: the model writes on, it does not fill in", param="suffix")
        if self.session is not None and len(self.prompt) > 1:
            raise Refused(400, "a session goes on in one way: prompt must be one", param="prompt")


class ChatRequest(Generation):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None

    @property
    def logprob_count(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def refuse_what_is_not_served(self) -> None:
        super().refuse_what_is_not_served()
        for name in ("tools", "functions"):
            if getattr(self, name):
                raise Refused(400, f"{name} are not served: ask for JSON with response_format", param=name)
        if self.top_logprobs is not None and not self.logprobs:
            raise Refused(400, "top_logprobs needs logprobs to be true", param="top_logprobs")

    @property
    def chat(self) -> list[dict[str, str]]:
        roles = {"developer": "system"}  # the name that OpenAI's newer models have for it
        return [{"role": roles.get(m.role, m.role), "content": m.content} for m in self.messages]


class Named(Wire):
    name: Name


class SaveRequest(Wire):
    session: Name
    name: Name


class RestoreRequest(Wire):
    session: Name


def read(kind: type[T], body: bytes) -> T:
    """The request in a JSON body.

    Raises:
        Refused: 400, with the field at fault.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param, said = field(first["loc"]), first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        raise Refused(400, f"the body is not JSON: {said.removeprefix('Invalid JSON: ')}", code="invalid_json")
    raise Refused(400, f"{param}: {said}", param=param or None, code="invalid_value")
