"""Errors over a real server and back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from relevo.core import errors
from relevo.core.errors import Exhausted, InvalidRequest, NotFound, RelevoError, Unavailable
from services.common.errors import error_from_proto, error_from_rpc, error_to_proto, relevo_errors
from services.common.grpc import Registration, cancelling, make_channel, make_server
from services.pb import kvtransfer_pb2, kvtransfer_pb2_grpc

TRANSLATED: list[type[RelevoError]] = [
    errors.InvalidRequest,
    errors.Unauthenticated,
    errors.NotFound,
    errors.Exhausted,
    errors.Cancelled,
    errors.Mismatch,
    errors.DataLoss,
    errors.Unavailable,
    errors.DeadlineExceeded,
    errors.RelevoError,
]


class FailingServicer(kvtransfer_pb2_grpc.KvTransferServicer):
    """Fails with `error` in each kind of method."""

    def __init__(self) -> None:
        self.error: Exception = RuntimeError("not set")
        self.cancelled = asyncio.Event()

    async def Attach(self, request: kvtransfer_pb2.AttachRequest, context: Any) -> kvtransfer_pb2.AttachReply:
        raise self.error

    async def Publish(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
        await context.write(kvtransfer_pb2.PublishReply())
        raise self.error

    async def Fetch(self, request_iterator: Any, context: Any) -> AsyncIterator[kvtransfer_pb2.FetchReply]:
        yield kvtransfer_pb2.FetchReply()
        async for _ in request_iterator:
            raise self.error

    async def Audit(self, request: kvtransfer_pb2.AuditRequest, context: Any) -> kvtransfer_pb2.AuditReply:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return kvtransfer_pb2.AuditReply()


@pytest.fixture
async def servicer() -> FailingServicer:
    return FailingServicer()  # type: ignore[abstract]  # methods of each kind are there, the others are not called


@pytest.fixture
async def stub(servicer: FailingServicer) -> AsyncIterator[Any]:
    add = kvtransfer_pb2_grpc.add_KvTransferServicer_to_server
    server = make_server([Registration(add, servicer, "relevo.v1.KvTransfer")], "127.0.0.1", 0)
    await server.start()
    async with make_channel(server.address) as channel:
        yield kvtransfer_pb2_grpc.KvTransferStub(channel)
    await server.stop(0)


async def fail_in(stub: Any, kind: str) -> None:
    if kind == "unary":
        await stub.Attach(kvtransfer_pb2.AttachRequest(), timeout=5)
    elif kind == "context":
        with cancelling(stub.Publish(timeout=5)) as call:
            while await call.read() is not grpc.aio.EOF:
                pass
    else:
        with cancelling(stub.Fetch(iter([kvtransfer_pb2.FetchRequest()]), timeout=5)) as call:
            async for _ in call:
                pass


@pytest.mark.parametrize("kind", ["unary", "context", "generator"])
async def test_error_arrives_as_the_same_class(servicer: FailingServicer, stub: Any, kind: str) -> None:
    for cls in TRANSLATED:
        servicer.error = cls("what was wrong")
        with pytest.raises(cls) as caught, relevo_errors("peer"):
            await fail_in(stub, kind)
        assert type(caught.value) is cls
        assert caught.value.message == "peer: what was wrong"


async def test_param_and_retry_after_arrive(servicer: FailingServicer, stub: Any) -> None:
    servicer.error = InvalidRequest("bad", "top_p")
    with pytest.raises(InvalidRequest) as invalid, relevo_errors():
        await fail_in(stub, "unary")
    assert invalid.value.param == "top_p"
    servicer.error = Exhausted("full", retry_after_seconds=1.5)
    with pytest.raises(Exhausted) as exhausted, relevo_errors():
        await fail_in(stub, "generator")
    assert exhausted.value.retry_after_seconds == 1.5


@pytest.mark.parametrize("kind", ["unary", "context", "generator"])
async def test_bug_is_internal_and_its_traceback_is_logged(
    servicer: FailingServicer, stub: Any, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    servicer.error = KeyError("secret")
    with caplog.at_level(logging.ERROR, "services.common.errors"), pytest.raises(grpc.aio.AioRpcError) as caught:
        await fail_in(stub, kind)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in (caught.value.details() or "")
    assert type(error_from_rpc(caught.value)) is RelevoError
    [record] = [record for record in caplog.records if record.name == "services.common.errors"]
    assert record.exc_info


async def test_cancellation_reaches_the_method(servicer: FailingServicer, stub: Any) -> None:
    with pytest.raises(errors.DeadlineExceeded), relevo_errors():
        await stub.Audit(kvtransfer_pb2.AuditRequest(), timeout=0.2)
    async with asyncio.timeout(5):
        await servicer.cancelled.wait()


async def test_nobody_there_is_unavailable_at_once() -> None:
    async with make_channel("127.0.0.1:1") as channel:
        stub = kvtransfer_pb2_grpc.KvTransferStub(channel)
        with pytest.raises(Unavailable), relevo_errors():
            await stub.Audit(kvtransfer_pb2.AuditRequest(), timeout=5)


@pytest.mark.parametrize("cls", TRANSLATED)
def test_error_message_is_translated_both_ways(cls: type[RelevoError]) -> None:
    back = error_from_proto(error_to_proto(cls("text")))
    assert type(back) is cls
    assert back.message == "text"


def test_error_message_keeps_param_and_retry_after() -> None:
    invalid = error_from_proto(error_to_proto(InvalidRequest("bad", "n")))
    assert isinstance(invalid, InvalidRequest)
    assert invalid.param == "n"
    exhausted = error_from_proto(error_to_proto(Exhausted("full", 2.5)))
    assert isinstance(exhausted, Exhausted)
    assert exhausted.retry_after_seconds == 2.5
    assert error_to_proto(NotFound("x")).code == 5  # google.rpc.Code
