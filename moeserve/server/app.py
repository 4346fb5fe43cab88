"""The HTTP application: OpenAI's endpoints, probes and metrics over a Frontend."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import msgspec
from fastapi import FastAPI, Path, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from moeserve import __version__
from moeserve.dashboard.live import LiveSource
from moeserve.server import openai
from moeserve.server.answer import GenerationResponse
from moeserve.server.balance import add_balance_routes
from moeserve.server.dashboard import dashboard_app
from moeserve.server.errors import ApiError, bad_value
from moeserve.server.frontend import Frontend, random_seed
from moeserve.server.guard import Guard
from moeserve.server.metrics import CONTENT_TYPE, render
from moeserve.server.render import ChatRenderer, CompletionRenderer
from moeserve.server.resolve import Resolved, resolve_chat, resolve_completion
from moeserve.server.settings import ServerSettings

LARGE_BODY_BYTES = 32 << 10  # more text than this takes milliseconds to tokenize

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": openai.ErrorAnswer, "description": text}
    for status, text in {
        400: "the request is wrong; param names the field",
        401: "no or a wrong API key",
        404: "no such model or path",
        413: "the body is too large",
        429: "too many requests wait; see retry-after",
        500: "the engine stopped during the request",
        503: "loading, draining or dead; see retry-after",
        504: "not finished within the server's request timeout",
    }.items()
}


def make_app(frontend: Frontend, settings: ServerSettings) -> FastAPI:
    """The application without its guard."""
    app = FastAPI(
        title="moeserve",
        version=__version__,
        description="OpenAI-compatible serving of mixture-of-experts models",
        docs_url=None,  # the pages load scripts from elsewhere
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
    )
    _add_openai_routes(app, frontend, settings)
    _add_probes(app, frontend)
    add_balance_routes(app, frontend.balance, frontend.check_serving)
    source = None if frontend.balance is None else LiveSource(frontend.balance)
    app.mount("/dashboard", dashboard_app(source, lambda: frontend.draining or frontend.dead.is_set()))
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_exception)
    _drop_validation_schema(app)
    return app


def guarded(app: FastAPI, frontend: Frontend, settings: ServerSettings) -> Guard:
    """What the HTTP server is given."""
    return Guard(
        app,
        api_keys=settings.api_keys,
        max_body_bytes=settings.body_limit,
        check_admission=frontend.check_admission,
    )


def _add_openai_routes(app: FastAPI, frontend: Frontend, settings: ServerSettings) -> None:
    completion_request = openai.for_model(openai.CompletionRequest, settings.model_name)
    chat_request = openai.for_model(openai.ChatRequest, settings.model_name)
    tokenizer = frontend.tokenizer
    started = int(time.time())

    def limits() -> ServerSettings:
        """With the context length that the ranks really have."""
        if frontend.max_seq_len == settings.max_seq_len:
            return settings
        return dataclasses.replace(settings, max_seq_len=frontend.max_seq_len)

    def fingerprint() -> str:
        return f"fp_{__version__}_{settings.config_hash}_e{frontend.placement_generation}"

    def answer(resolved: Resolved, renderer: type[ChatRenderer] | type[CompletionRenderer]) -> Response:
        generation = frontend.submit(resolved.prompts, resolved.params, n=resolved.n, stop=resolved.stop)
        made = renderer(resolved, tokenizer, settings, fingerprint())
        return GenerationResponse(generation, made, stream=resolved.stream)

    stream_schema = {"text/event-stream": {"schema": {"type": "string"}}}

    async def create_completion(request: Any, raw: Request) -> Response:
        given = (request, tokenizer, limits(), random_seed())
        resolved = await _run(resolve_completion, raw, *given)
        return answer(resolved, CompletionRenderer)

    async def create_chat_completion(request: Any, raw: Request) -> Response:
        given = (request, tokenizer, limits(), random_seed())
        resolved = await _run(resolve_chat, raw, *given)
        return answer(resolved, ChatRenderer)

    create_completion.__annotations__["request"] = completion_request
    create_chat_completion.__annotations__["request"] = chat_request
    app.post(
        "/v1/completions",
        response_model=openai.CompletionAnswer,
        responses={**ERRORS, 200: {"content": stream_schema}},
    )(create_completion)
    app.post(
        "/v1/chat/completions",
        response_model=openai.ChatAnswer,
        responses={**ERRORS, 200: {"content": stream_schema}},
    )(create_chat_completion)

    def card() -> dict[str, Any]:
        return {
            "id": settings.model_name,
            "object": "model",
            "created": started,
            "owned_by": "moeserve",
            "max_model_len": frontend.max_seq_len,
        }

    listed: dict[int | str, dict[str, Any]] = {status: ERRORS[status] for status in (401, 404)}

    @app.get("/v1/models", response_model=openai.ModelList, responses=listed)
    async def list_models() -> Response:
        return _json({"object": "list", "data": [card()]})

    @app.get("/v1/models/{model:path}", response_model=openai.ModelCard, responses=listed)
    async def retrieve_model(
        model: str = Path(json_schema_extra={"enum": [settings.model_name]}),
    ) -> Response:
        if model != settings.model_name:
            raise ApiError(
                404,
                f"The model `{model}` does not exist; this server has `{settings.model_name}`.",
                param="model",
                code="model_not_found",
            )
        return _json(card())


def _add_probes(app: FastAPI, frontend: Frontend) -> None:
    @app.get("/livez")
    async def livez() -> Response:
        """200 as long as the process answers, also while it drains."""
        return _json({"status": "alive"})

    async def readyz() -> Response:
        """200 when every rank has been heard of recently and new work is taken, else 503."""
        ready, phase, reason = frontend.readiness()
        ages = {str(rank): round(age, 3) for rank, age in frontend.heartbeat_ages().items()}
        body = {"ready": ready, "phase": phase, "reason": reason, "heartbeat_age_seconds": ages}
        if frontend.balance is not None:  # a dead balancer is told, but what is served is right
            online = frontend.balance.online
            body |= {"balancer": frontend.balance.state, "balancer_reason": online.trouble if online else ""}
        return _json(body, 200 if ready else 503)

    not_ready: dict[int | str, dict[str, Any]] = {503: {"description": "not ready; the body says why"}}
    app.get("/readyz", responses=not_ready)(readyz)
    app.get("/health", responses=not_ready, name="health")(readyz)

    @app.get("/version")
    async def version() -> Response:
        return _json({"version": __version__})

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(render(frontend.registry), headers={"content-type": CONTENT_TYPE})


async def _run(resolve: Callable[..., Resolved], raw: Request, *given: Any) -> Resolved:
    """In a thread when there is much to tokenize, so that running streams go on."""
    length = raw.headers.get("content-length", "")
    if length.isdigit() and int(length) < LARGE_BODY_BYTES:
        return resolve(*given)
    return await asyncio.to_thread(resolve, *given)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return Response(error.body(), error.status, error.headers, "application/json")


async def _on_invalid(request: Request, error: Exception) -> Response:
    """FastAPI's findings as one OpenAI error about the first field."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()[0]
    if found["type"] == "json_invalid":
        reason = found.get("ctx", {}).get("error", "")
        return await _on_api_error(
            request, ApiError(400, f"the body is not JSON: {reason}", code="invalid_json")
        )
    path = [part for part in found["loc"][1:] if isinstance(part, (str, int))]
    names = [str(part) for part in path]
    if not names:
        message = "the body must be a JSON object, sent with content-type: application/json"
        return await _on_api_error(request, ApiError(400, message, code="invalid_json"))
    union = next((name for name in names if name in openai.WANTED), None)
    if union is not None and (union != "content" or "text" not in names[names.index(union) :]):
        names = names[: names.index(union) + 1]
    param = ".".join(names)
    if found["type"] == "missing" and union is None:
        missing = ApiError(400, f"{param}: it is required", param=param, code="missing_required_parameter")
        return await _on_api_error(request, missing)
    value = _value_at(error.body, names)
    wanted = openai.WANTED[union] if union == names[-1] else found["msg"][:1].lower() + found["msg"][1:]
    if value is _MISSING:
        return await _on_api_error(
            request,
            ApiError(
                400, f"{param}: it is required: {wanted}", param=param, code="missing_required_parameter"
            ),
        )
    return await _on_api_error(request, bad_value(param, value, wanted))


_MISSING = object()


def _value_at(body: Any, names: list[str]) -> Any:
    for name in names:
        if isinstance(body, dict) and name in body:
            body = body[name]
        elif isinstance(body, list) and name.isdigit() and int(name) < len(body):
            body = body[int(name)]
        else:
            return _MISSING
    return body


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    texts = {
        404: f"there is no {request.url.path} here",
        405: f"{request.url.path} does not take {request.method}",
    }
    codes = {404: "not_found", 405: "method_not_allowed"}
    status = error.status_code
    message = texts.get(status, str(error.detail))
    headers = dict(error.headers or {})
    return await _on_api_error(request, ApiError(status, message, code=codes.get(status), headers=headers))


async def _on_exception(request: Request, error: Exception) -> Response:
    failure = ApiError(
        500, "the server made a mistake; see its log", kind="server_error", code="internal_error"
    )
    return await _on_api_error(request, failure)


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _drop_validation_schema(app: FastAPI) -> None:
    """Takes FastAPI's 422 out of the schema: the answer to a wrong request is 400 here."""
    original: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        schema = original()
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schema.get("components", {}).get("schemas", {}).pop(name, None)
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
