"""Between relevo's errors and gRPC: status codes, the `Error` message, and the interceptor that every server has."""

from __future__ import annotations

import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Any, NoReturn

import grpc
import grpc.aio

from relevo.core.errors import (
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    Exhausted,
    InvalidRequest,
    Mismatch,
    NotFound,
    RelevoError,
    Unauthenticated,
    Unavailable,
)
from services.pb import messages_pb2

logger = logging.getLogger(__name__)

_PARAM_KEY = "relevo-param"
_RETRY_AFTER_KEY = "relevo-retry-after-seconds"
_MAX_DETAILS = 2000  # characters; longer ones would not fit in the trailers

_CLASSES: Mapping[str, type[RelevoError]] = {
    cls.grpc_code: cls
    for cls in (
        InvalidRequest,
        Unauthenticated,
        NotFound,
        Exhausted,
        Cancelled,
        Mismatch,
        DataLoss,
        Unavailable,
        DeadlineExceeded,
    )
} | {
    "ABORTED": Unavailable,  # the call was cut off half way: as with UNAVAILABLE, another one may succeed
    "UNIMPLEMENTED": Mismatch,  # the peer speaks another version
    "OUT_OF_RANGE": InvalidRequest,
}
_NUMBERS: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def status_code(error: RelevoError) -> grpc.StatusCode:
    return grpc.StatusCode[error.grpc_code]


def make_error(
    code: grpc.StatusCode, message: str, *, param: str = "", retry_after_seconds: float = 0.0
) -> RelevoError:
    """The relevo error of a status code. Codes that are in no class of the tree are RelevoError itself (INTERNAL)."""
    cls = _CLASSES.get(code.name, RelevoError)
    if cls is InvalidRequest:
        return InvalidRequest(message, param or None)
    if cls is Exhausted:
        return Exhausted(message, retry_after_seconds)
    return cls(message)


def error_from_rpc(error: grpc.aio.AioRpcError, peer: str = "") -> RelevoError:
    """What a failed call means. peer: whom it went to, for the message."""
    trailers = {key: value for key, value in error.trailing_metadata() or () if isinstance(value, str)}
    details = error.details() or error.code().name
    try:
        retry_after_seconds = float(trailers.get(_RETRY_AFTER_KEY, "0"))
    except ValueError:
        retry_after_seconds = 0.0
    message = f"{peer}: {details}" if peer else details
    param = trailers.get(_PARAM_KEY, "")
    return make_error(error.code(), message, param=param, retry_after_seconds=retry_after_seconds)


@contextmanager
def relevo_errors(peer: str = "") -> Iterator[None]:
    """Calls made inside raise relevo's errors instead of AioRpcError."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error, peer) from error


def error_to_proto(error: RelevoError) -> messages_pb2.Error:
    message = messages_pb2.Error(code=status_code(error).value[0], message=error.message)
    if isinstance(error, InvalidRequest) and error.param:
        message.param = error.param
    if isinstance(error, Exhausted):
        message.retry_after_seconds = error.retry_after_seconds
    return message


def error_from_proto(message: messages_pb2.Error) -> RelevoError:
    return make_error(
        _NUMBERS.get(message.code, grpc.StatusCode.UNKNOWN),
        message.message,
        param=message.param,
        retry_after_seconds=message.retry_after_seconds,
    )


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: RelevoError) -> NoReturn:
    """End the call with the error's status."""
    trailers: list[tuple[str, str | bytes]] = []
    if isinstance(error, InvalidRequest) and error.param:
        trailers.append((_PARAM_KEY, error.param))
    if isinstance(error, Exhausted) and error.retry_after_seconds:
        trailers.append((_RETRY_AFTER_KEY, str(error.retry_after_seconds)))
    await context.abort(status_code(error), error.message[:_MAX_DETAILS], tuple(trailers))
    raise AssertionError("abort returned")


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """RelevoError → its status; CancelledError and aborts stay; anything else → INTERNAL, with a traceback logged."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None  # unknown method: gRPC answers UNIMPLEMENTED
        kind = f"{_arity(handler.request_streaming)}_{_arity(handler.response_streaming)}"
        wrapped = _guarded(getattr(handler, kind), str(handler_call_details.method))
        make_handler = getattr(grpc, f"{kind}_rpc_method_handler")
        result: grpc.RpcMethodHandler[Any, Any] = make_handler(
            wrapped, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer
        )
        return result


def _arity(streaming: bool) -> str:
    return "stream" if streaming else "unary"


def _guarded(behaviour: Callable[..., Any], method: str) -> Callable[..., Any]:
    """The behaviour with its errors translated; of the same kind, because gRPC looks at that."""
    if inspect.isasyncgenfunction(behaviour):

        async def generate(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            try:
                async with aclosing(behaviour(request, context)) as replies:
                    async for reply in replies:
                        yield reply
            except Exception as error:
                await _answer(error, context, method)

        return generate
    if not inspect.iscoroutinefunction(behaviour):
        return behaviour  # health and reflection: gRPC's own, synchronous ones

    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await behaviour(request, context)
        except Exception as error:
            await _answer(error, context, method)

    return call


async def _answer(error: Exception, context: grpc.aio.ServicerContext[Any, Any], method: str) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if context.done():  # the caller left or was cut off: nobody is there to be told
        logger.debug("%s: %r after its caller left", method, error)
        raise error
    if isinstance(error, RelevoError):
        await abort(context, error)
    logger.error("%s failed", method, exc_info=error)
    await abort(context, RelevoError(f"{method}: internal error ({type(error).__name__})"))
