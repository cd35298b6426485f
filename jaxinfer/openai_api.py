"""The OpenAI API's requests and errors: what a body may say, and the SamplingParams it comes to.

Every field is honoured or refused: an unknown one is an error, and so is a known one that this server cannot serve unless
its value asks for nothing. Beyond OpenAI's fields there are vLLM's, under vLLM's names. Ranges are SamplingParams' own.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from jaxinfer.request import MAX_LOGPROBS, RequestOutputKind, SamplingParams, StructuredOutputsParams

# The fields that give an answer its form, of which a request has at most one.
FORMS = ("structured_outputs", "response_format", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
DEFAULT_MAX_TOKENS = 16  # of a completion; a chat answer may fill the model's length


class ApiError(Exception):
    """An answer that is an error, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}

    def body(self) -> dict[str, Any]:
        kind = {429: "rate_limit_error", 401: "authentication_error"}.get(self.status)
        kind = kind or ("invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Body(BaseModel):
    """A JSON object with known keys only; no value is coerced to another type."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=False)


class StreamOptions(Body):
    include_usage: bool | None = None


class StructuredOutputs(Body):
    json_: str | dict[str, Any] | None = Field(default=None, alias="json", description="a JSON Schema")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = Field(default=None, description="context-free, in llguidance's dialect of Lark or in GBNF")
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None


class JsonSchema(Body):
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = Field(default=None, description="the schema is always followed strictly")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class SamplingBody(Body):
    """What completions and chat completions have in common."""

    # field → the values, beside null, that ask for nothing
    refused: ClassVar[dict[str, list[Any]]] = {}

    model: str | None = Field(default=None, description="one of /v1/models; null is the first of them")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, description="only written to the log")
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = Field(default=None, description="token id → bias")
    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: int | None = Field(default=None, description="not with stream")
    priority: int | None = Field(default=None, description="smaller runs first; needs --scheduling-policy priority")
    add_special_tokens: bool | None = Field(default=None, description="BOS and EOS round the prompt's tokens")
    return_token_ids: bool | None = Field(default=None, description="token_ids and prompt_token_ids in choices")
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    @field_validator("*", mode="before")
    @classmethod
    def _refuse(cls, value: Any, info: ValidationInfo) -> Any:
        neutral = cls.refused.get(info.field_name or "")
        if neutral is not None and value is not None and value not in neutral:
            allowed = " or ".join(["null", *map(repr, neutral)])
            raise ValueError(f"this server does not support it; leave it out (or give {allowed})")
        return value


class CompletionRequest(SamplingBody):
    """POST /v1/completions"""

    refused = {"suffix": [""]}

    prompt: str | list[str] | list[int] | list[list[int]] = Field(description="text, or token ids; one or a list")
    echo: bool | None = None
    logprobs: int | None = Field(default=None, description="alternatives a token, 0 to 20")
    best_of: int | None = Field(default=None, description="only the value of n")
    suffix: Any = Field(default=None, description="not supported")

    def prompts(self) -> list[Any]:
        """One entry a prompt, each text or token ids."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]
        return list(self.prompt)


class ChatCompletionRequest(SamplingBody):
    """POST /v1/chat/completions"""

    refused = {
        "tools": [[]], "tool_choice": ["none"], "functions": [[]], "function_call": ["none"],
        "parallel_tool_calls": [True, False],
        "audio": [], "modalities": [["text"]], "prediction": [], "reasoning_effort": ["none"], "verbosity": [],
        "service_tier": ["auto", "default"], "store": [False], "metadata": [{}], "web_search_options": [],
        "prompt_cache_key": [], "prompt_cache_retention": [],
    }  # fmt: skip

    messages: list[dict[str, Any]] = Field(min_length=1, description="role, content (text or text parts), and more")
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, description="0 to 20; needs logprobs")
    safety_identifier: str | None = Field(default=None, description="only written to the log")
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = Field(default=None, description="the name of one of the model's")
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Any = Field(default=None, description="not supported")
    tool_choice: Any = Field(default=None, description="not supported")
    functions: Any = Field(default=None, description="not supported")
    function_call: Any = Field(default=None, description="not supported")
    parallel_tool_calls: Any = Field(default=None, description="not supported")
    audio: Any = Field(default=None, description="not supported")
    modalities: Any = Field(default=None, description="text only")
    prediction: Any = Field(default=None, description="not supported")
    reasoning_effort: Any = Field(default=None, description="not supported; see chat_template_kwargs")
    verbosity: Any = Field(default=None, description="not supported")
    service_tier: Any = Field(default=None, description="there is one")
    store: Any = Field(default=None, description="nothing is stored")
    metadata: Any = Field(default=None, description="nothing is stored")
    web_search_options: Any = Field(default=None, description="not supported")
    prompt_cache_key: Any = Field(default=None, description="not supported; prefixes are found by their tokens")
    prompt_cache_retention: Any = Field(default=None, description="not supported")


class GenerateRequest(Body):
    """POST /generate"""

    prompt: str | list[int]
    max_tokens: int = Field(default=DEFAULT_MAX_TOKENS, ge=1)


class TokenizeRequest(Body):
    """POST /tokenize: prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = Field(default=None, description="null: true for a prompt, false for messages")
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Body):
    """POST /detokenize"""

    model: str | None = None
    tokens: list[int]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorDetail


def bad_request(error: ValueError, body: Body) -> ApiError:
    """A 400 for an engine's ValueError; its param is the request's field that the message begins with."""
    message = str(error).removeprefix("SamplingParams: ")
    param = next((word for word in re.findall(r"\w+", message)[:3] if word in type(body).model_fields), None)
    if param == "structured_outputs":
        param = next((name for name in FORMS if getattr(body, name, None) is not None), None)
    return ApiError(400, message, param)


_TEMPLATE_NAMES = frozenset(["self", "messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template"])


def template_options(body: ChatCompletionRequest | TokenizeRequest) -> dict[str, Any]:
    """Arguments of Tokenizer.render_chat.

    Raises ApiError for a template's text: it is a program, and only the server's owner may bring one (--chat-template).
    """
    if body.chat_template is not None and any(mark in body.chat_template for mark in "{\n"):
        raise ApiError(400, "chat_template: only the name of one of the model's templates is taken", "chat_template")
    variables = body.chat_template_kwargs or {}
    if wrong := sorted(_TEMPLATE_NAMES & set(variables)):
        raise ApiError(400, f"chat_template_kwargs may not have the key {wrong[0]!r}", "chat_template_kwargs")
    continued = bool(body.continue_final_message)
    return variables | {
        "add_generation_prompt": not continued if body.add_generation_prompt is None else body.add_generation_prompt,
        "continue_final_message": continued,
        "chat_template": body.chat_template,
    }


_SAMPLING = frozenset(field.name for field in dataclasses.fields(SamplingParams)) - {"logprobs", "structured_outputs"}


def sampling_params(body: CompletionRequest | ChatCompletionRequest, defaults: SamplingParams) -> SamplingParams:
    """The body's fields over the model's defaults.

    Raises:
        ValueError: a value out of range, beginning with the field's name. ApiError: fields that exclude each other.
    """
    given = {name: value for name, value in body if name in _SAMPLING and value is not None}
    if body.stream and body.prompt_logprobs is not None:
        raise ApiError(400, "prompt_logprobs comes with whole answers only; leave out stream", "prompt_logprobs")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options is for streams only; set stream to true", "stream_options")
    if body.logit_bias is not None:
        given["logit_bias"] = _token_bias(body.logit_bias)
    if isinstance(body, CompletionRequest):
        given |= _completion_fields(body)
    else:
        given |= _chat_fields(body)
    given["structured_outputs"] = _structured_outputs(body)
    given["output_kind"] = RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY
    return dataclasses.replace(defaults, **given)


def _completion_fields(body: CompletionRequest) -> dict[str, Any]:
    if body.best_of not in (None, body.n or 1):
        raise ApiError(400, f"best_of = {body.best_of}: only the value of n ({body.n or 1}) is supported", "best_of")
    fields: dict[str, Any] = {"logprobs": body.logprobs}
    if body.max_tokens == 0:  # OpenAI's way to score a prompt
        if not body.echo or body.stream:
            raise ApiError(400, "max_tokens = 0 needs echo and no stream: there is nothing else to answer", "max_tokens")
        fields["max_tokens"] = 1
    if body.echo and body.logprobs is not None:
        fields["prompt_logprobs"] = body.logprobs
    return fields


def _chat_fields(body: ChatCompletionRequest) -> dict[str, Any]:
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs = true", "top_logprobs")
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= MAX_LOGPROBS:
        raise ApiError(400, f"top_logprobs must be 0 to {MAX_LOGPROBS}, got {body.top_logprobs}", "top_logprobs")
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise ApiError(400, "max_tokens and max_completion_tokens say two things; give one", "max_completion_tokens")
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    fields: dict[str, Any] = {"logprobs": (body.top_logprobs or 0) if body.logprobs else None}
    return fields | ({} if limit is None else {"max_tokens": limit})


def _token_bias(bias: dict[str, float]) -> dict[int, float]:
    for key in bias:
        if not re.fullmatch(r"[0-9]{1,10}", key):
            raise ApiError(400, f"logit_bias has the key {key[:40]!r}; keys are token ids", "logit_bias")
    return {int(key): value for key, value in bias.items()}


def _structured_outputs(body: SamplingBody) -> StructuredOutputsParams | None:
    forms: dict[str, dict[str, Any]] = {}
    if body.structured_outputs is not None:
        forms["structured_outputs"] = body.structured_outputs.model_dump(by_alias=True)
    for name in ("json", "regex", "choice", "grammar"):
        if (value := getattr(body, f"guided_{name}")) is not None:
            forms[f"guided_{name}"] = {name: value}
    wanted = body.response_format
    if wanted is not None and (wanted.type == "json_schema") != (wanted.json_schema is not None):
        raise ApiError(400, "response_format: json_schema belongs to the type json_schema", "response_format")
    if wanted is not None and wanted.type != "text":
        schema = wanted.json_schema
        forms["response_format"] = {"json_object": True} if schema is None else {"json": schema.schema_}
    if len(forms) > 1:
        raise ApiError(400, f"{' and '.join(forms)} each give the answer a form; give one of them", list(forms)[-1])
    for name, form in forms.items():
        try:
            return StructuredOutputsParams(**form)
        except ValueError as error:
            raise ApiError(400, str(error).removeprefix("SamplingParams: "), name) from error
    return None
