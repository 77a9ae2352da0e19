"""The router's front door: OpenAI's HTTP API, and what belongs around it."""

from __future__ import annotations

import time
from functools import partial
from typing import Any, Literal

from fastapi import APIRouter, FastAPI
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp
from typing_extensions import TypedDict

from relevo.core.errors import NotFound, RelevoError, Unavailable
from relevo.model_files import GenerationDefaults
from relevo.tokenizer import Tokenizer
from services.common.telemetry import render_metrics
from services.router.admission import Admission
from services.router.generation import Dispatcher
from services.router.http.body import body_route
from services.router.http.chat import ChatReply, create_chat_completion, render_chat
from services.router.http.choices import check_prompt
from services.router.http.completions import CompletionReply, create_completion
from services.router.http.errors import ErrorReply, JsonResponse, handle_http_exception, handle_relevo_error
from services.router.http.exchange import Exchange, ExchangeLayer, handle_bug
from services.router.http.hot_routes import HotRoutes
from services.router.http.limits import Limiter
from services.router.http.live import LiveView
from services.router.http.live_routes import live_routes, ui_routes
from services.router.http.metrics import EdgeMetrics
from services.router.http.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from services.router.http.serving import EdgeConfig, Serving, run_long
from services.router.http.structure import StructureChecker
from services.router.tracing import Tracer

__all__ = ["EdgeConfig", "create_app"]

_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorReply}, "5XX": {"model": ErrorReply}}


class Model(TypedDict):
    """max_model_len: tokens, prompt and output together; null before the first worker was seen"""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[Model]


class TokenizeReply(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizeReply(TypedDict):
    prompt: str


def create_app(
    config: EdgeConfig,
    tokenizer: Tokenizer | None,
    defaults: GenerationDefaults,
    dispatcher: Dispatcher,
    *,
    registry: CollectorRegistry | None = None,
    limiter: Limiter | None = None,
    live: LiveView | None = None,
    tracer: Tracer | None = None,
) -> ASGIApp:
    """The ASGI app.

    registry: what /metrics shows; the app adds its own to it
    limiter: counts what API keys with limits do; None: in this process
    live: what /debug/fleet shows; without somebody who runs it there is no history and no stream
    tracer: exports traces; None: none are
    """
    metrics = EdgeMetrics(CollectorRegistry() if registry is None else registry)
    admission = Admission(dispatcher, config.admission, metrics.registry)
    structure = StructureChecker(tokenizer, defaults.eos_token_ids)
    serving = Serving(config, tokenizer, defaults, dispatcher, admission, metrics, structure)
    live = live or LiveView()
    live.attach(serving)
    api = FastAPI(
        title="Relevo",
        description="An OpenAI-compatible API. Parameters that are not listed are refused by name.",
        version=config.version,
        redirect_slashes=False,
        exception_handlers={
            RelevoError: handle_relevo_error,
            HTTPException: handle_http_exception,
            Exception: handle_bug,
        },
    )
    openai = _openai_routes(serving)
    api.include_router(openai)
    api.include_router(_text_routes(serving))
    api.include_router(_operator_routes(serving))
    api.include_router(live_routes(live))
    api.include_router(ui_routes())
    app: ASGIApp = ExchangeLayer(
        HotRoutes(api, openai, config.max_body_bytes),
        config.keys,
        metrics,
        salt_by_api_key=config.salt_by_api_key,
        limiter=limiter,
        tracer=tracer,
    )
    if config.cors_origins:  # outside the layer that asks for keys: a browser asks first whether it may, without one
        app = CORSMiddleware(
            app,
            allow_origins=config.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("x-request-id", "retry-after"),
        )
    return app


def _openai_routes(serving: Serving) -> APIRouter:
    router = APIRouter(route_class=body_route(serving.config.max_body_bytes), tags=["OpenAI"])

    @router.post("/v1/completions", response_model=CompletionReply, responses=_ERRORS)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """With stream: true, server-sent events of the same shape, ended by [DONE]."""
        return await create_completion(serving, Exchange.of(request.scope), body)

    @router.post("/v1/chat/completions", response_model=ChatReply, responses=_ERRORS)
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """With stream: true, server-sent events: OpenAI's chat.completion.chunk, ended by [DONE]."""
        return await create_chat_completion(serving, Exchange.of(request.scope), body)

    return router


def _text_routes(serving: Serving) -> APIRouter:
    router = APIRouter(route_class=body_route(serving.config.max_body_bytes), tags=["Text and tokens"])

    @router.post("/tokenize", response_model=TokenizeReply, responses=_ERRORS)
    async def tokenize(request: Request, body: TokenizeRequest) -> Response:
        """The token ids that a completion or a chat would begin with."""
        serving.model_name(body.model)
        param, text, special = "prompt", body.prompt, True
        if text is None:
            assert body.messages is not None
            param, special = "messages", False
            text = render_chat(serving, body.messages, body.add_generation_prompt, {})
        special = special if body.add_special_tokens is None else body.add_special_tokens
        tokenizer = serving.require_tokenizer(param)
        encode = partial(tokenizer.encode, text, add_special_tokens=special)
        token_ids = await run_long(len(text), encode)
        reply: TokenizeReply = {
            "count": len(token_ids),
            "max_model_len": serving.model().max_model_len,
            "tokens": token_ids,
        }
        return JsonResponse(reply)

    @router.post("/detokenize", response_model=DetokenizeReply, responses=_ERRORS)
    async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
        """The text of token ids."""
        serving.model_name(body.model)
        tokenizer = serving.require_tokenizer("tokens")
        if body.tokens:
            check_prompt(body.tokens, serving.model(), "tokens")
        text = await run_long(
            len(body.tokens), lambda: tokenizer.decode(body.tokens, skip_special_tokens=body.skip_special_tokens)
        )
        reply: DetokenizeReply = {"prompt": text}
        return JsonResponse(reply)

    return router


def _operator_routes(serving: Serving) -> APIRouter:
    router = APIRouter(tags=["Models and operation"])
    created = int(time.time())

    def describe(name: str) -> Model:
        model = serving.dispatcher.model()
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "relevo",
            "max_model_len": None if model is None else model.max_model_len,
        }

    @router.get("/v1/models", response_model=ModelList, responses=_ERRORS)
    async def list_models() -> Response:
        models: ModelList = {"object": "list", "data": [describe(name) for name in serving.config.served_model_names]}
        return JsonResponse(models)

    @router.get("/v1/models/{model_id:path}", response_model=Model, responses=_ERRORS)
    async def get_model(model_id: str) -> Response:
        return JsonResponse(describe(serving.model_name(model_id)))

    @router.get("/health", responses=_ERRORS)
    async def health() -> Response:
        """200 if a request could be served now, else 503. `warning`: what is amiss all the same."""
        if not serving.dispatcher.is_ready():
            reason = serving.dispatcher.complaint() or "none is connected"
            raise Unavailable(f"no worker is ready to serve a request: {reason}")
        warning = serving.dispatcher.warning()
        return JsonResponse({"status": "ok", "warning": warning} if warning else {"status": "ok"})

    @router.get("/debug/route/{request_id}", responses=_ERRORS)
    async def route(request_id: str) -> Response:
        """Why a request, by its x-request-id or by its answer's id, went where it went: one object a choice."""
        found = serving.dispatcher.explain(serving.answer_ids.of(request_id))
        if not found:
            raise NotFound(f"no request {request_id[:200]!r} is among the last that were placed")
        return JsonResponse(found)

    @router.get("/version")
    async def version() -> Response:
        return JsonResponse({"version": serving.config.version})

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """In Prometheus' text format."""
        body, content_type = render_metrics(serving.metrics.registry)
        return Response(body, headers={"content-type": content_type})

    return router
