"""Request bodies: read with a limit, parsed by orjson, validated by the route's pydantic model.

FastAPI would read a body of any size, look at its content type and answer in its own shape; the schema it makes from
the handler's signature is what we keep of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, get_type_hints

import orjson
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from relevo.core.errors import Cancelled, InvalidRequest, PayloadTooLarge
from services.router.http.exchange import Exchange
from services.router.http.protocol import RequestBody

Body = TypeVar("Body", bound=RequestBody)

_MAX_SHOWN_CHARS = 80


def body_route(max_body_bytes: int) -> type[APIRoute]:
    """A class of routes whose handlers are called as `handler(request, body)`; body is annotated with its model."""

    class BodyRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            return body_handler(self.endpoint, max_body_bytes)

    return BodyRoute


def body_handler(
    endpoint: Callable[..., Any], max_body_bytes: int
) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    """Reads and validates the body that the endpoint's annotation asks for, and calls it."""
    model: type[RequestBody] = get_type_hints(endpoint)["body"]

    async def handle(request: Request) -> Response:
        raw = await read_body(request, max_body_bytes)
        Exchange.of(request.scope).received = time.perf_counter()
        body = parse_body(raw, model)
        response = await endpoint(request, body)
        assert isinstance(response, Response)
        return response

    return handle


async def read_body(request: Request, max_body_bytes: int) -> bytes:
    """The whole body. Raises PayloadTooLarge as soon as it is known to be; whatever its content type says."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > max_body_bytes:
        raise _too_large(max_body_bytes)
    chunks: list[bytes] = []
    num_bytes = 0
    try:
        async for chunk in request.stream():
            num_bytes += len(chunk)
            if num_bytes > max_body_bytes:
                raise _too_large(max_body_bytes)
            chunks.append(chunk)
    except ClientDisconnect as error:
        raise Cancelled("the client left before its request was complete") from error
    return b"".join(chunks)


def parse_body(raw: bytes, model: type[Body]) -> Body:
    """Raises InvalidRequest naming the parameter at fault. NaN and Infinity are not JSON."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {_shown(value)}")
    try:
        return model.model_validate(model.take_known(value))
    except ValidationError as error:
        raise _translate(error, value) from error


def _too_large(max_body_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the body is larger than {max_body_bytes} bytes")


def _translate(error: ValidationError, body: dict[str, Any]) -> InvalidRequest:
    """The first of pydantic's complaints, in our words."""
    first = error.errors(include_url=False, include_context=False)[0]
    location = first["loc"]
    if not location:
        return InvalidRequest(first["msg"])
    param = str(location[0])
    path = param + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in location[1:])
    match first["type"]:
        case "missing":
            return InvalidRequest(f"{path} is required", param)
        case "extra_forbidden":
            return InvalidRequest(f"{path} is not a parameter", param)
    what = first["msg"].removeprefix("Input should be ")
    return InvalidRequest(f"{path} must be {what}, not {_shown(first['input'])}", param)


def _shown(value: object) -> str:
    text = repr(value) if isinstance(value, str | int | float | bool | None) else f"a JSON {_kind(value)}"
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]}…"


def _kind(value: object) -> str:
    return "array" if isinstance(value, list) else "object"
