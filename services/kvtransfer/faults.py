"""Faults on purpose: operations of the hand-over that take longer, fail, or end in the middle; bits that flip.

Nothing else in the agent knows of this. With --faults an interceptor stands between gRPC and the servicer: the handlers
of Attach, Publish and Fetch get a context whose reads and writes fail now and then, by a seeded generator.
"""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

import grpc
import grpc.aio

from relevo.core.errors import InvalidRequest, Unavailable
from services.common.grpc import Registration
from services.kvtransfer.store import Store
from services.pb import chaos_pb2, chaos_pb2_grpc

MAX_DELAY_MS = 60_000
_SERVICE = "/relevo.v1.KvTransfer/"
_METHODS = (f"{_SERVICE}Attach", f"{_SERVICE}Publish", f"{_SERVICE}Fetch")

Context = grpc.aio.ServicerContext[Any, Any]


class _Cut(Unavailable):
    """For the handler an error like any other; the caller sees a stream that ends as if all had been said."""


@dataclass
class Faults:
    """What may happen to an operation, with which probability, and what has."""

    delay_ms: float = 0.0
    delay_probability: float = 0.0
    drop_probability: float = 0.0
    cut_probability: float = 0.0
    num_operations: int = 0
    num_delayed: int = 0
    num_dropped: int = 0
    num_cut: int = 0
    num_corrupted: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(0)

    async def befall(self, *, is_stream: bool) -> None:
        """An operation begins. Raises Unavailable if it is to fail."""
        self.num_operations += 1
        delayed, dropped, cut = (
            self.random.random() < probability
            for probability in (self.delay_probability, self.drop_probability, self.cut_probability)
        )
        if delayed:
            self.num_delayed += 1
            await asyncio.sleep(self.delay_ms / 1000)
        if dropped:
            self.num_dropped += 1
            raise Unavailable("dropped on purpose (--faults)")
        if cut and is_stream:
            self.num_cut += 1
            raise _Cut("cut off on purpose (--faults)")

    def corrupt(self, store: Store, num_blocks: int) -> int:
        """Flip a bit in each of so many sealed blocks; returns in how many."""
        sealed = store.table.sealed_slots()
        chosen = self.random.sample(sealed, min(num_blocks, len(sealed)))
        for slot in chosen:
            block = store.arena.block(slot)
            block[self.random.randrange(len(block))] ^= 1 << self.random.randrange(8)
        self.num_corrupted += len(chosen)
        return len(chosen)


class FaultInterceptor(grpc.aio.ServerInterceptor):
    """Inside the one that translates errors."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler: Any = await continuation(handler_call_details)
        if handler is None or handler_call_details.method not in _METHODS:
            return handler  # type: ignore[no-any-return]  # gRPC's handlers are untyped inside
        is_stream = bool(handler.response_streaming)
        behaviour = handler.stream_stream if is_stream else handler.unary_unary
        if not inspect.iscoroutinefunction(behaviour):
            return handler  # type: ignore[no-any-return]  # a refusal
        make_handler = grpc.stream_stream_rpc_method_handler if is_stream else grpc.unary_unary_rpc_method_handler
        return make_handler(
            self._disturbed(behaviour, is_stream),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _disturbed(self, behaviour: Callable[..., Awaitable[Any]], is_stream: bool) -> Callable[..., Awaitable[Any]]:
        async def call(request: Any, context: Context) -> Any:
            if not is_stream:
                await self._faults.befall(is_stream=False)
                return await behaviour(request, context)
            disturbed = _DisturbedContext(context, self._faults)
            try:
                return await behaviour(request, disturbed)
            except Unavailable:
                if disturbed.is_cut:
                    return None  # OK: the end of the stream
                raise

        return call


class _DisturbedContext:
    """A context whose reads and writes are operations."""

    def __init__(self, context: Context, faults: Faults) -> None:
        self.is_cut = False
        self._context = context
        self._faults = faults

    def invocation_metadata(self) -> Any:
        return self._context.invocation_metadata()

    async def read(self) -> Any:
        message = await self._context.read()  # first: an operation begins when there is something to be done
        await self._befall()
        return message

    async def write(self, message: Any) -> None:
        await self._befall()
        await self._context.write(message)

    async def _befall(self) -> None:
        try:
            await self._faults.befall(is_stream=True)
        except _Cut:
            self.is_cut = True
            raise


class ChaosServicer(chaos_pb2_grpc.ChaosServicer):
    def __init__(self, faults: Faults, store: Store) -> None:
        self._faults = faults
        self._store = store

    async def SetFaults(self, request: chaos_pb2.SetFaultsRequest, context: Context) -> chaos_pb2.Faults:
        changes = {field.name: value for field, value in request.ListFields()}
        seed = changes.pop("seed", None)
        for name, value in changes.items():
            limit = MAX_DELAY_MS if name == "delay_ms" else 1
            if not 0 <= value <= limit:
                raise InvalidRequest(f"{name} is {value:g}: 0 to {limit} is right", name)
        for name, value in changes.items():
            setattr(self._faults, name, value)
        if seed is not None:
            self._faults.random.seed(seed)
        return chaos_pb2.Faults(**asdict(self._faults))

    async def CorruptBlocks(
        self, request: chaos_pb2.CorruptBlocksRequest, context: Context
    ) -> chaos_pb2.CorruptBlocksReply:
        return chaos_pb2.CorruptBlocksReply(num_blocks=self._faults.corrupt(self._store, request.num_blocks))


def chaos_registration(faults: Faults, store: Store) -> Registration:
    return Registration(chaos_pb2_grpc.add_ChaosServicer_to_server, ChaosServicer(faults, store), "relevo.v1.Chaos")
