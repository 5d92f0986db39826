"""Requests: OpenAI's fields that are served here, and our own beside them, validated by pydantic.

Unknown fields are ignored, as OpenAI's server does; known ones that are not served are refused by name. A request turns
itself into prompts (`prompts`) and sampling parameters (`sampling`); `completion.py` runs them.
"""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from retentive.data.media import Media, media_of
from retentive.data.tokenizer import Tokenizer
from retentive.data.tools import in_words
from retentive.infer import SamplingParams
from retentive.infer.conversation import NAME, Conversation
from retentive.sampling import SAMPLED
from retentive.serve.choices import Prompt
from retentive.serve.errors import Refused
from retentive.serve.media import OpenMedia, content
from retentive.serve.messages import Body, Message, Part, TextPart, Tool, ToolChoice, chosen_tools
from retentive.serve.options import Options

COLDEST = 1e-4
"""Temperature below which decoding is greedy, since dividing logits by less would overflow."""
SHORT_ANSWER = 16
"""Default max_tokens of a completion (not a chat), as OpenAI's."""

Name = Annotated[str, Field(pattern=NAME)]


# Validators run before pydantic's own check of types, so they pass on unknown values.


def _as_list(value: Any) -> Any:
    """Returns `stop`, one string or a list, as a list."""
    return [value] if isinstance(value, str) else value


def _as_prompts(value: Any) -> Any:
    """Returns `prompt`, a text, ids or a list of either, as a list."""
    prompts = [value] if isinstance(value, str) or (isinstance(value, list) and _are_ids(value)) else value
    if not isinstance(prompts, list) or not prompts:
        raise ValueError("expected a string, a list of token ids, or a list of either")
    for prompt in prompts:
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and _are_ids(prompt)):
            raise ValueError("expected a string, a list of token ids, or a list of either")
    return prompts


def _are_ids(value: list) -> bool:
    return bool(value) and all(type(i) is int for i in value)  # type(), since true is not an id


# Every token is checked against these, in a thread that all requests share, so they are bounded.
Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=256)]], BeforeValidator(_as_list), Field(max_length=16)
]
Bias = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)]


class StreamOptions(Body):
    include_usage: bool = False


class Schema(Body):
    # an alias, since pydantic has its own method `schema`
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None


class Generation(Body, ABC):
    """Fields of both kinds of completion. All may be None, since null means not given."""

    prompt_field: ClassVar[str]
    """Name of the field with the prompt, for errors."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    stop: Stops | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    logit_bias: Bias | None = None
    seed: Annotated[int, Field(ge=-(2**62), le=2**62)] | None = None
    response_format: ResponseFormat | None = None
    session: Name | None = None

    # known, but not served
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    @property
    @abstractmethod
    def logprob_count(self) -> int | None:
        """Number of likeliest tokens beside each token; None for no log probabilities."""

    @property
    @abstractmethod
    def characters(self) -> int:
        """Characters (or ids) of all prompts, a measure of the work to encode them."""

    @property
    def media(self) -> int:
        """Characters of its pictures and sounds, which are always much work."""
        return 0

    @property
    def offered_tools(self) -> list[Tool]:
        """Tools that the model may call; raises Refused as `chosen_tools`."""
        return []

    @property
    def several_calls(self) -> bool:
        """True if an answer may call several tools."""
        return True

    @property
    def must_call(self) -> bool:
        """True if the answer must be a call."""
        return False

    @property
    def echoed(self) -> dict[str, Any]:
        """Fields that a response repeats, where its API does so."""
        return {}

    @abstractmethod
    def prompts(self, conversation: Conversation, options: Options, open_media: OpenMedia | None) -> list[Prompt]:
        """Returns the prompts as ids that continue `conversation`, with the rows of pictures and sound among them.

        Args:
            open_media: function that opens media; None for a model that reads only text.

        Raises:
            Refused: the template refuses the messages, or pictures or sound are damaged or not for this model.
        """

    @abstractmethod
    def length(self, most: int) -> int:
        """Returns max_tokens for the engine, on a server that allows at most `most`.

        Raises:
            Refused: the request asks for more.
        """

    def stops(self, conversation: Conversation) -> tuple[frozenset[int], list[str]]:
        """Returns (ids, strings) that end a completion."""
        return frozenset({conversation.tokenizer.eos_id}), list(self.stop or ())

    def check_size(self, options: Options) -> None:
        """Raises Refused (413) for more text or media than `options` allow."""
        for what, size, most in (
            ("the text", self.characters, options.most_body),
            ("all that is seen and heard", self.media, options.most_media),
        ):
            if size > most:
                raise Refused(
                    413, f"{what} is larger than {most} bytes", param=self.prompt_field, code="body_too_large"
                )

    def refuse_what_is_not_served(self) -> None:
        """Raises Refused for fields of OpenAI's API that this server ignores but that would change the answer."""
        for name in ("presence_penalty", "frequency_penalty"):
            if getattr(self, name):
                raise Refused(400, f"{name} is not served: use repetition_penalty", param=name)
        if self.session is not None and (self.n or 1) > 1:
            raise Refused(400, "a session goes on in one way: n must be 1", param="n")

    def sampling(self, default: SamplingParams) -> SamplingParams:
        """Returns the sampling parameters: those of the request, and the default's for the others."""
        given = {name: value for name in SAMPLED if (value := getattr(self, name)) is not None}
        if given.get("temperature", 1.0) < COLDEST or given.get("top_p") == 0:  # the likeliest token alone
            given |= {"temperature": 0, "top_p": 1.0}
        return replace(default, **given, bias=self._bias(), seed=self.seed)

    def _bias(self) -> dict[int, float]:
        """Returns logit_bias with ids as keys, which are strings in JSON."""
        try:
            return {int(token): value for token, value in (self.logit_bias or {}).items()}
        except ValueError:
            raise Refused(400, "the keys of logit_bias must be token ids", param="logit_bias") from None


class CompletionRequest(Generation):
    prompt_field = "prompt"
    prompt: Annotated[list[str | list[int]], BeforeValidator(_as_prompts)]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = None
    suffix: str | None = None

    @property
    def logprob_count(self) -> int | None:
        return self.logprobs

    @property
    def characters(self) -> int:
        return sum(map(len, self.prompt))

    def prompts(self, conversation: Conversation, options: Options, open_media: OpenMedia | None) -> list[Prompt]:
        """Puts an end-of-text token before a text, as before documents in training; takes ids as they are."""
        tokenizer, prompts = conversation.tokenizer, []
        for prompt in self.prompt:
            if isinstance(prompt, str):
                [ids] = tokenizer.encode_batch([prompt])  # releases the GIL, which `encode` does not
                before, text = conversation.lead, prompt
            else:
                ids, before = prompt, conversation.memory.pending
                text = tokenizer.decode(ids) if self.echo else ""
            prompts.append(Prompt([*before, *ids], sent=len(ids), text=text if self.echo else None))
        return prompts

    def length(self, most: int) -> int:
        asked = min(SHORT_ANSWER, most) if self.max_tokens is None else self.max_tokens
        return _at_most(most, asked, "max_tokens")

    def refuse_what_is_not_served(self) -> None:
        super().refuse_what_is_not_served()
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise Refused(400, "best_of is not served: ask for n and choose", param="best_of")
        if self.suffix:
            raise Refused(400, "suffix is not served: the model writes on, it does not fill in", param="suffix")
        if self.session is not None and len(self.prompt) > 1:
            raise Refused(400, "a session goes on in one way: prompt must be one", param="prompt")


class ChatRequest(Generation):
    prompt_field = "messages"
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None

    @property
    def logprob_count(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def characters(self) -> int:
        said = sum(len(part.text) for part in self._parts if isinstance(part, TextPart))
        calls = [call.function for message in self.messages for call in message.tool_calls or ()]
        tools = sum(len(tool.model_dump_json()) for tool in self.tools or ())
        return said + tools + sum(len(call.name) + len(call.arguments) for call in calls)

    @property
    def media(self) -> int:
        return sum(len(part.encoded) for part in self._parts if not isinstance(part, TextPart))

    @property
    def _parts(self) -> list[Part]:
        return [part for message in self.messages for part in message.content or ()]

    @property
    def offered_tools(self) -> list[Tool]:
        return chosen_tools(self.tools or (), self.tool_choice)

    @property
    def several_calls(self) -> bool:
        return self.parallel_tool_calls is not False

    @property
    def must_call(self) -> bool:
        return self.tool_choice is not None and self.tool_choice not in ("none", "auto")

    @property
    def uses_tools(self) -> bool:
        """True if tools are offered, or were called earlier in the conversation."""
        return bool(self.offered_tools) or any(m.tool_calls or m.role == "tool" for m in self.messages)

    def prompts(self, conversation: Conversation, options: Options, open_media: OpenMedia | None) -> list[Prompt]:
        """Returns the messages as the chat template renders them; in a session only new ones are sent."""
        roles = {"developer": "system"}  # OpenAI's newer name, unknown to templates
        messages, media = list[Any](), list[Media]()
        for n, m in enumerate(self.messages):
            name = f"{self.prompt_field}[{n}]"
            called = m.called(name)
            found = content(m.content or [], open_media, media, options, f"{name}.content")
            media += media_of([{"content": found}])
            if m.role in ("assistant", "tool") and not isinstance(found, str):
                message = "an answer is text: pictures and sounds are the user's"
                raise Refused(400, message, param=f"{name}.content")
            messages.append({"role": roles.get(m.role, m.role), "content": found, **called})
        try:
            tools = [tool.described() for tool in self.offered_tools]
            if self.uses_tools and not conversation.template.shows_tools:
                messages, tools = in_words(messages, tools), []
            ids, rows = conversation.turn(messages, tools)
            return [Prompt(ids, rows=rows)]
        except ValueError as error:
            raise Refused(400, str(error), param=self.prompt_field, code="template_refuses") from None

    def length(self, most: int) -> int:
        if self.max_completion_tokens is not None:
            return _at_most(most, self.max_completion_tokens, "max_completion_tokens")
        return most if self.max_tokens is None else _at_most(most, self.max_tokens, "max_tokens")

    def stops(self, conversation: Conversation) -> tuple[frozenset[int], list[str]]:
        """Returns (ids, strings) of the template's end of an answer and of the request's `stop`."""
        template = conversation.template
        return template.stop_ids, [*(self.stop or ()), *template.stop]

    def refuse_what_is_not_served(self) -> None:
        super().refuse_what_is_not_served()
        if self.functions:
            raise Refused(400, "functions are not served: use tools", param="functions")
        if self.top_logprobs is not None and not self.logprobs:
            raise Refused(400, "top_logprobs needs logprobs to be true", param="top_logprobs")


def _at_most(most: int, asked: int, param: str) -> int:
    if asked > most:
        raise Refused(400, f"{param} is at most {most} on this server, got {asked}", param=param)
    return asked


class EmbeddingRequest(Body):
    model: str | None = None
    input: Annotated[list[str | list[int]], BeforeValidator(_as_prompts), Field(max_length=2048)]
    encoding_format: Literal["float", "base64"] | None = None
    pooling: Literal["mean", "last"] | None = None
    dimensions: int | None = None

    def texts(self, tokenizer: Tokenizer, options: Options) -> list[list[int]]:
        """Returns the ids of each text, after an end-of-text token.

        Raises:
            Refused: a text is empty, or all together are longer than a prompt may be.
        """
        found = [x if isinstance(x, list) else tokenizer.encode(x) for x in self.input]
        for n, ids in enumerate(found):
            if not ids:
                raise Refused(400, "a text to embed is empty", param=f"input[{n}]")
        if (tokens := sum(map(len, found))) > options.max_prompt:
            message = f"the texts have {tokens} tokens together, this server takes {options.max_prompt}"
            raise Refused(400, message, param="input", code="context_length_exceeded")
        return [[tokenizer.eos_id, *ids] for ids in found]


class Named(Body):
    name: Name


class SaveRequest(Body):
    session: Name
    name: Name
    model: str | None = None


class RestoreRequest(Body):
    session: Name
    model: str | None = None
