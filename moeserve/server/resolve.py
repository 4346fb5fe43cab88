"""From a request's shape to what the engine is told: defaults settled, limits of model and server checked.

Pure: no engine, no event loop. Every refusal is an ApiError with the field, the value and what would do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moeserve.messages import SamplingParams
from moeserve.server.errors import ApiError, bad_value
from moeserve.server.openai import UNSUPPORTED, ChatRequest, CompletionRequest, SamplingRequest
from moeserve.server.settings import ServerSettings
from moeserve.text import Tokenizer

COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for completions


@dataclass(frozen=True)
class Resolved:
    """One request, ready for Frontend.submit, and what its answer has to show."""

    prompts: list[list[int]]
    texts: list[str]  # of the prompts, as echo shows them; empty for chat and without echo
    params: SamplingParams
    n: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    continuous_usage: bool
    echo: bool = False


def resolve_completion(
    request: CompletionRequest, tokenizer: Tokenizer, settings: ServerSettings, seed: int
) -> Resolved:
    """seed: used when the request names none."""
    _check_common(request, settings)
    n = request.n or 1
    if request.best_of is not None and request.best_of != n:
        raise bad_value("best_of", request.best_of, f"only best_of equal to n ({n}) is supported")
    prompts = _prompts_as_ids(request.prompt, tokenizer, settings.max_seq_len)
    if len(prompts) * n > settings.max_sequences:
        raise bad_value("n", n, f"{len(prompts)} prompts x n may be {settings.max_sequences} at most")
    echo = bool(request.echo)
    if request.max_tokens == 0 and not echo:
        raise bad_value("max_tokens", 0, "use 1 or more, or set echo to have the prompt scored")
    longest = max(map(len, prompts))
    limit = settings.max_seq_len
    asked = request.max_tokens
    max_tokens = min(COMPLETION_TOKENS, limit - longest) if asked is None else asked
    _check_length("prompt", longest, max_tokens if asked is not None else max(1, max_tokens), limit)
    texts = (
        [_echo_text(request.prompt, index, ids, tokenizer) for index, ids in enumerate(prompts)]
        if echo
        else []
    )
    scored = 0 if asked == 0 and request.logprobs is None else request.logprobs
    params = _sampling(
        request,
        tokenizer,
        max_tokens=max_tokens,
        logprobs=request.logprobs,
        prompt_logprobs=scored if echo else None,
        seed=seed,
    )
    return Resolved(prompts, texts, params, n, _stops(request), *_streaming(request), echo=echo)


def resolve_chat(request: ChatRequest, tokenizer: Tokenizer, settings: ServerSettings, seed: int) -> Resolved:
    _check_common(request, settings)
    if request.top_logprobs is not None and not request.logprobs:
        raise bad_value("top_logprobs", request.top_logprobs, "it needs logprobs: true")
    messages = []
    for message in request.messages:
        extra = message.model_extra or {}
        for key in ("tool_calls", "function_call", "audio"):
            if extra.get(key):
                raise bad_value(f"messages.{key}", extra[key], "tools and audio are not supported")
        content = message.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        role = "system" if message.role == "developer" else message.role
        messages.append({"role": role, "content": text})
    try:
        rendered = tokenizer.render_chat(messages, template_values=request.chat_template_kwargs)
        _check_text("messages", rendered, tokenizer, settings.max_seq_len)
        prompt = tokenizer.encode(rendered, add_special_tokens=False)
    except ValueError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_value") from None
    if not prompt:
        raise bad_value("messages", "", "the model's chat template makes an empty prompt of them")
    left = settings.max_seq_len - len(prompt)
    asked = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    _check_length("messages", len(prompt), 1 if asked is None else asked, settings.max_seq_len)
    default = tokenizer.defaults.max_new_tokens or left
    params = _sampling(
        request,
        tokenizer,
        max_tokens=min(default, left) if asked is None else asked,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        prompt_logprobs=None,
        seed=seed,
    )
    return Resolved([prompt], [], params, request.n or 1, _stops(request), *_streaming(request))


def _check_common(request: SamplingRequest, settings: ServerSettings) -> None:
    if request.model != settings.model_name:
        raise ApiError(
            404,
            f"The model `{request.model}` does not exist; this server has `{settings.model_name}`.",
            param="model",
            code="model_not_found",
        )
    for name, value in (request.model_extra or {}).items():
        harmless = UNSUPPORTED.get(name)
        if harmless is not None and value not in harmless:
            raise bad_value(
                name, value, "this server does not support it: leave it out", "unsupported_parameter"
            )
    if request.stream_options is not None and not request.stream:
        raise bad_value(
            "stream_options", request.stream_options.model_dump(), "it is allowed with stream: true only"
        )
    if request.n is not None and request.n > settings.max_choices:
        raise bad_value("n", request.n, f"at most {settings.max_choices}")
    stops = _stops(request)
    if len(stops) > settings.max_stop_strings:
        raise bad_value("stop", list(stops), f"at most {settings.max_stop_strings} stop strings")
    for stop in stops:
        if len(stop) > settings.max_stop_length:
            raise bad_value("stop", stop, f"at most {settings.max_stop_length} characters each")
    if len(request.logit_bias or ()) > settings.max_logit_bias:
        raise bad_value(
            "logit_bias", len(request.logit_bias or ()), f"at most {settings.max_logit_bias} tokens"
        )
    if request.return_routed_experts and not settings.num_moe_layers:
        raise bad_value("return_routed_experts", True, "this model has no experts")


def _stops(request: SamplingRequest) -> tuple[str, ...]:
    stop = request.stop
    return () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)


def _streaming(request: SamplingRequest) -> tuple[bool, bool, bool]:
    options = request.stream_options
    wanted = options is not None and bool(options.include_usage)
    return bool(request.stream), wanted, options is not None and bool(options.continuous_usage_stats)


def _check_length(param: str, prompt: int, completion: int, limit: int) -> None:
    if prompt + completion > limit:
        raise _too_long(
            param,
            limit,
            f"{prompt + completion} tokens ({prompt} in the {param}, {completion} in the completion)",
        )


def _check_text(param: str, text: str, tokenizer: Tokenizer, limit: int) -> None:
    """Refuses hopeless lengths before seconds go into tokenizing them."""
    fewest = tokenizer.fewest_tokens(text)
    if fewest > limit:
        raise _too_long(param, limit, f"more than {fewest} tokens in the {param}")


def _too_long(param: str, limit: int, requested: str) -> ApiError:
    # LiteLLM and others know the case by the first sentence.
    return ApiError(
        400,
        f"This model's maximum context length is {limit} tokens. However, you requested {requested}. "
        f"Please reduce the length of the {param} or completion.",
        param=param,
        code="context_length_exceeded",
    )


def _prompts_as_ids(prompt: Any, tokenizer: Tokenizer, limit: int) -> list[list[int]]:
    single = isinstance(prompt, str) or isinstance(prompt[0], int)
    prompts = []
    for one in [prompt] if single else prompt:
        if isinstance(one, str):
            _check_text("prompt", one, tokenizer, limit)
        ids = tokenizer.encode(one) if isinstance(one, str) else list(one)
        if not ids:
            raise bad_value("prompt", one, "it has no token; send at least one")
        if max(ids) >= tokenizer.vocab_size:
            raise bad_value("prompt", max(ids), f"token ids of this model are below {tokenizer.vocab_size}")
        prompts.append(ids)
    return prompts


def _echo_text(prompt: Any, index: int, ids: list[int], tokenizer: Tokenizer) -> str:
    if isinstance(prompt, str):
        return prompt
    one = prompt[index]
    return one if isinstance(one, str) else tokenizer.decode(ids, skip_special_tokens=False)


def _sampling(
    request: SamplingRequest,
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    seed: int,
) -> SamplingParams:
    """A field left out (or null) is the model's default of generation_config.json, else OpenAI's."""
    model = tokenizer.defaults
    stop_ids = tuple(request.stop_token_ids or ())
    if stop_ids and max(stop_ids) >= tokenizer.vocab_size:
        raise bad_value("stop_token_ids", max(stop_ids), f"token ids are below {tokenizer.vocab_size}")
    ignore_eos = bool(request.ignore_eos)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=float(_first(request.temperature, model.temperature, 1.0)),
        top_p=max(float(_first(request.top_p, model.top_p, 1.0)), 1e-6),  # 0 keeps the likeliest token alone
        top_k=max(0, int(_first(request.top_k, model.top_k, 0))),
        min_p=float(_first(request.min_p, model.min_p, 0.0)),
        presence_penalty=float(request.presence_penalty or 0.0),
        frequency_penalty=float(request.frequency_penalty or 0.0),
        repetition_penalty=float(_first(request.repetition_penalty, model.repetition_penalty, 1.0)),
        logit_bias=_logit_bias(request.logit_bias, tokenizer.vocab_size),
        seed=(seed if request.seed is None else request.seed) & ((1 << 63) - 1),
        stop_token_ids=stop_ids if ignore_eos else tuple(dict.fromkeys(stop_ids + tokenizer.eos_token_ids)),
        ignore_eos=ignore_eos,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        return_routed_experts=bool(request.return_routed_experts),
    )


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


def _logit_bias(given: dict[str, float] | None, vocab_size: int) -> dict[int, float]:
    bias = {}
    for key, value in (given or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size):
            raise bad_value(
                "logit_bias", key, f"its keys are token ids from 0 to {vocab_size - 1}, as strings"
            )
        bias[int(key)] = float(value)
    return bias
