"""The bodies of OpenAI's API that the server takes. A field that is not listed here is refused by name."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cqil_trt.sampling import MAX_LOGPROBS
from cqil_trt.serving.refusals import Refused

B = TypeVar("B", bound=BaseModel)

MAX_CHOICES = 16
MAX_STOPS = 16
# Errors of a body that are looked at; to list a million of them would take seconds.
_MANY_ERRORS = 10_000

Number = Annotated[float, Field(allow_inf_nan=False)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class Sampled(Body):
    """What chat and text completions share. None: the default."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] | None = None
    logit_bias: Annotated[dict[str, Annotated[Number, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    ignore_eos: bool | None = None
    user: str | None = None
    # Grammars, as vLLM names them.
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1)] | None = None
    guided_grammar: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        given = self.stop
        return () if given is None else (given,) if isinstance(given, str) else tuple(given)

    @model_validator(mode="after")
    def _check(self) -> Sampled:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: needs stream to be true")
        if any(not text for text in self.stops):
            raise ValueError("stop: needs texts that are not empty")
        grammars = [name for name in self._grammars if getattr(self, name, None) is not None]
        if len(grammars) > 1:
            raise ValueError(f"{grammars[1]}: cannot be used together with {grammars[0]}")
        return self

    @property
    def _grammars(self) -> tuple[str, ...]:
        return "guided_json", "guided_regex", "guided_choice", "guided_grammar"


class TextPart(Body):
    type: Literal["text"]
    text: str


class CalledFunction(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    # What OpenAI's client makes of an answer has these, without a value.
    annotations: None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _check(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError("content: is missing")
        return self


class Function(Body):
    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema: goes with type json_schema")
        return self


class ChatBody(Sampled):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def _grammars(self) -> tuple[str, ...]:
        return (*super()._grammars, *(("response_format",) if self.wants_json else ()))

    @property
    def wants_json(self) -> bool:
        return self.response_format is not None and self.response_format.type != "text"

    @model_validator(mode="after")
    def _check_chat(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs to be true")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise ValueError("tool_choice: needs tools")
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            if name not in [tool.function.name for tool in self.tools or ()]:
                raise ValueError(f"tool_choice: {name!r} is not one of the tools")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionBody(Sampled):
    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=64)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=64)]
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None

    @property
    def limit(self) -> int:
        given = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return 16 if given is None else given  # OpenAI's default

    @property
    def prompts(self) -> list[str | list[int]]:
        given: Any = self.prompt
        return [given] if isinstance(given, str) or isinstance(given[0], int) else given


class TokenizeBody(Body):
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _check(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: give either prompt or messages")
        return self


class DetokenizeBody(Body):
    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


def parse(kind: type[B], body: bytes) -> B:
    """The body as `kind`. Raises Refused that names the field that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        if error.error_count() > _MANY_ERRORS:
            raise Refused(400, f"the body is wrong in {error.error_count()} places") from None
        found, place = _deepest(error, body)
        message = found["msg"].removeprefix("Value error, ")
        name, _, rest = message.partition(": ")
        if found["type"] == "value_error" and rest:
            place.append(name)
            message = rest
        if found["type"] == "extra_forbidden":
            message = "is not supported"
        field = ".".join(place) or None
        raise Refused(400, f"{field or 'the body'}: {message}", field) from None


def _deepest(error: ValidationError, body: bytes) -> tuple[Any, list[str]]:
    """The error to report and its place in the body: of a field that takes several forms, the form that fits best."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    placed = [(found, _place(found, value)) for found in errors if found["loc"][:1] == errors[0]["loc"][:1]]
    return max(placed, key=lambda pair: len(pair[1]))


def _place(found: Any, value: Any) -> list[str]:
    """Where in the body an error is. Pydantic's own place also has the names of types, which no client knows."""
    place = []
    for number, part in enumerate(found["loc"], 1):
        last = number == len(found["loc"])
        inside = part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int)
        if inside:
            value = value[part]
        if inside or (last and found["type"] == "missing"):
            place.append(str(part))
    return place
