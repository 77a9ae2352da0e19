"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}} under a proper status."""

from __future__ import annotations

import math
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from relevo.core.errors import (
    Exhausted,
    InvalidRequest,
    NotFound,
    PayloadTooLarge,
    RelevoError,
    Unauthenticated,
    Unavailable,
)

RETRY_UNAVAILABLE_SECONDS = 5  # about what a worker takes to start


class ErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(TypedDict):
    error: ErrorDetail


class ModelNotFound(NotFound):
    """The request names a model that is not served here."""

    param = "model"


class UnknownParameter(InvalidRequest):
    """No API has a parameter of this name."""


class UnsupportedParameter(InvalidRequest):
    """OpenAI or vLLM have this parameter; Relevo has not, or not with this value."""


class ContextLengthExceeded(InvalidRequest):
    """Prompt and output do not fit in the model's context."""


class MethodNotAllowed(InvalidRequest):
    """There is such a route, for other methods."""

    http_status = 405


_CODES: dict[type[RelevoError], str] = {
    ModelNotFound: "model_not_found",
    UnknownParameter: "unknown_parameter",
    UnsupportedParameter: "unsupported_parameter",
    ContextLengthExceeded: "context_length_exceeded",
    PayloadTooLarge: "request_too_large",
    Unauthenticated: "invalid_api_key",
    Exhausted: "rate_limit_exceeded",
}


class JsonResponse(Response):
    """Written by orjson. NaN and infinities become null, which is why nobody may put them in."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


def error_reply(error: RelevoError) -> ErrorReply:
    return {
        "error": {
            "message": error.message,
            "type": error.error_type,
            "param": getattr(error, "param", None),
            "code": _CODES.get(type(error)),
        }
    }


def internal_error(request_id: str) -> RelevoError:
    """What a client is told of a bug of ours; the log has the rest."""
    return RelevoError(f"internal error; the server's log has it under request id {request_id}")


def error_response(error: RelevoError) -> JsonResponse:
    headers = {}
    if isinstance(error, Exhausted):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_seconds)))
    if isinstance(error, Unavailable):
        headers["retry-after"] = str(RETRY_UNAVAILABLE_SECONDS)
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    return JsonResponse(error_reply(error), status_code=error.http_status, headers=headers)


async def handle_relevo_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RelevoError)
    return error_response(error)


async def handle_http_exception(request: Request, error: Exception) -> Response:
    """What the routing itself refuses: unknown paths and wrong methods."""
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path
    if error.status_code == 405:
        response = error_response(MethodNotAllowed(f"{path} does not answer {method}"))
        response.headers.update(error.headers or {})
        return response
    if error.status_code == 404:
        return error_response(NotFound(f"there is no route {method} {path}"))
    reply = error_reply(InvalidRequest(str(error.detail)))
    return JsonResponse(reply, status_code=error.status_code, headers=error.headers)
