"""Shapes of OpenAI's requests and answers: what is read, what is refused, what the schema says.

Types and ranges live here; what depends on the model (context length, vocabulary) is checked in resolve.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, create_model

# Fields that clients know and this server cannot honour: saying so beats an answer that ignores them.
# A value in the tuple asks for nothing and is let through.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""),
    "tools": (None, []),
    "functions": (None, []),
    "function_call": (None, "none"),
    "tool_choice": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "structured_outputs": (None,),
    "min_tokens": (None, 0),
    "use_beam_search": (None, False),
    "length_penalty": (None, 1, 1.0),
    "prompt_logprobs": (None,),
    "truncate_prompt_tokens": (None,),
    "include_stop_str_in_output": (None, False),
    "prompt_embeds": (None,),
}

MAX_PROMPTS = 1024
TokenId = Annotated[int, Field(ge=0)]
NonEmpty = Annotated[str, StringConstraints(min_length=1)]
Probability = Annotated[float, Field(ge=0, le=1)]


class Shape(BaseModel):
    """strict: a number in quotes is no number. Unknown fields are let through: OpenAI's clients send them."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class StreamOptions(Shape):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingRequest(Shape):
    """The fields that both endpoints share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=128)
    stop: NonEmpty | Annotated[list[NonEmpty], Field(max_length=4)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024, fail_fast=True)] | None = None
    seed: int | None = Field(None, ge=-(1 << 63), le=(1 << 63) - 1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: Probability | None = None
    top_k: int | None = Field(None, ge=-1, description="0 and -1 switch it off")
    min_p: Probability | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, description="token id, as a string, to what is added to its logit"
    )
    ignore_eos: bool | None = None
    return_routed_experts: bool | None = Field(
        None,
        description="adds routed_experts to each choice: [tokens][MoE layers][top_k] expert ids, prompt and "
        "completion but for the last token; when streaming, with the choice's last chunk; not there when a stop "
        "string ended the choice",
    )
    user: str | None = None


class CompletionRequest(SamplingRequest):
    prompt: (
        NonEmpty
        | Annotated[list[NonEmpty], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]],
            Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True),
        ]
    )
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1, description="only equal to n")


class TextPart(Shape):
    type: Literal["text"]
    text: str


class Message(Shape):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]


class ChatRequest(SamplingRequest):
    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    chat_template_kwargs: dict[str, Any] | None = None


# What would do, for fields whose pydantic message (one per branch of a union) helps nobody.
WANTED = {
    "prompt": "a text, a list of token ids, or a list of at most 1024 texts or lists of token ids; none of them empty",
    "stop": "a text or a list of at most 4, none of them empty",
    "content": "a text or a list of {type: text, text: ...} parts",
}


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int] | None = None


class LegacyLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: LegacyLogprobs | None
    finish_reason: Literal["stop", "length"]
    routed_experts: list[list[list[int]]] | None = None


class CompletionAnswer(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class TokenAlternative(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobs(TokenAlternative):
    top_logprobs: list[TokenAlternative]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprobs] | None
    refusal: None = None


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    routed_experts: list[list[list[int]]] | None = None


class ChatAnswer(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    error: ErrorDetail


def for_model(shape: type[SamplingRequest], model_name: str) -> type[Any]:
    """The shape with the served model's name as the one that the schema allows for `model`.

    Only in the schema: another name is answered with 404 and a sentence.
    """
    field = Field(description="the served model", json_schema_extra={"enum": [model_name]})
    return create_model(shape.__name__, __base__=shape, model=(str, field))
