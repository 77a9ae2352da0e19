"""One bidirectional stream to a worker, shared by all requests that this router has there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
import grpc.aio

from relevo.core.errors import InvalidRequest, RelevoError, Unavailable
from relevo.core.worker_load import PromptWork, WorkerLoad
from services.common.errors import relevo_errors
from services.common.grpc import MAX_MESSAGE_BYTES
from services.pb import decode_pb2, decode_pb2_grpc, messages_pb2, prefill_pb2, prefill_pb2_grpc, worker_pb2
from services.router.breaker import CircuitBreaker
from services.router.inbox import Inbox

MAX_PENDING_SUBMITS = 1024
_FIRST_TOKENS = frozenset({"first_token", "tokens"})  # updates that say that the prompt is computed
_UNAVAILABLE = grpc.StatusCode.UNAVAILABLE.value[0]
MAX_COMMAND_BYTES = MAX_MESSAGE_BYTES - 4096  # what is added on the way, such as a ticket's numbers, has room

Command: TypeAlias = prefill_pb2.PrefillCommand | decode_pb2.DecodeCommand
Update: TypeAlias = prefill_pb2.PrefillUpdate | decode_pb2.DecodeUpdate


@dataclass(frozen=True)
class WorkerKind:
    """What differs between the roles' streams."""

    role: worker_pb2.Role.ValueType
    name: str
    open: Callable[[grpc.aio.Channel], grpc.aio.StreamStreamCall[Any, Any]]
    cancel: Callable[[], Command]


PREFILL = WorkerKind(
    worker_pb2.ROLE_PREFILL,
    "prefill",
    lambda channel: prefill_pb2_grpc.PrefillServiceStub(channel).Prefill(),
    lambda: prefill_pb2.PrefillCommand(cancel=prefill_pb2.CancelPrefill()),
)
DECODE = WorkerKind(
    worker_pb2.ROLE_DECODE,
    "decode",
    lambda channel: decode_pb2_grpc.DecodeServiceStub(channel).Generate(),
    lambda: decode_pb2.DecodeCommand(cancel=decode_pb2.CancelDecode()),
)


class WorkerCall:
    """One request on a worker's stream. What the worker says of it goes to its inbox, with the call beside it.

    The last item is an Ended, or an Unavailable if the stream broke. After cancel() nothing comes any more.
    """

    def __init__(self, stream: RequestStream, handle: int, inbox: RequestInbox) -> None:
        self.handle = handle
        self.inbox = inbox
        self.ended = False
        self.has_begun = False  # the worker has said something of it, and not as its last word
        self._stream = stream

    def send(self, command: Command) -> None:
        """A further command; nothing happens if the call has ended."""
        if not self.ended:
            self._stream.send(self.handle, command)

    def cancel(self) -> None:
        """Tells the worker, unless the call has ended."""
        self._stream.cancel(self)


RequestInbox: TypeAlias = Inbox[tuple[WorkerCall, Update | RelevoError]]


class RequestStream:
    """Multiplexes requests by handle. run() lives as long as the stream; when it returns every call has ended."""

    def __init__(
        self,
        kind: WorkerKind,
        channel: grpc.aio.Channel,
        peer: str,
        load: WorkerLoad[messages_pb2.Load],
        breaker: CircuitBreaker,
    ) -> None:
        self.idle = asyncio.Event()  # no request is on it
        self.idle.set()
        self._breaker = breaker
        self._kind = kind
        self._peer = peer
        self._load = load
        self._call = kind.open(channel)
        self._calls: dict[int, WorkerCall] = {}
        self._next_handle = 1
        # Bounded: with MAX_PENDING_SUBMITS in it submit() refuses, and each request adds no more than four others.
        self._commands: asyncio.Queue[Command] = asyncio.Queue()
        self._over: asyncio.Future[Unavailable] = asyncio.get_running_loop().create_future()

    @property
    def num_requests(self) -> int:
        return len(self._calls)

    def submit(self, command: Command, inbox: RequestInbox, work: PromptWork) -> WorkerCall:
        """A new request; `command` is its Submit, `work` what is to be done with the prompt.

        Raises Unavailable if the stream is over or the worker does not take commands, InvalidRequest if it is too big.
        """
        if self._over.done():
            raise Unavailable(self._over.result().message)
        if command.ByteSize() > MAX_COMMAND_BYTES:  # gRPC would end the stream, and everybody else's requests with it
            raise InvalidRequest(f"the prompt is too long to be sent: {command.ByteSize()} bytes", "prompt")
        if self._commands.qsize() >= MAX_PENDING_SUBMITS:
            raise Unavailable(f"{self._peer} does not read: {self._commands.qsize()} commands are waiting to be sent")
        call = WorkerCall(self, self._next_handle, inbox)
        self._next_handle += 1
        self._calls[call.handle] = call
        self.idle.clear()
        self._breaker.sent(call.handle)
        self._load.sent(call.handle, work, asyncio.get_running_loop().time())
        self.send(call.handle, command)
        return call

    def send(self, handle: int, command: Command) -> None:
        command.handle = handle
        self._commands.put_nowait(command)

    def cancel(self, call: WorkerCall) -> None:
        if not call.ended:
            self._forget(call)
            self.send(call.handle, self._kind.cancel())

    def break_off(self, reason: RelevoError) -> None:
        """End the stream, and with it all of its requests. The first reason counts."""
        if not self._over.done():
            self._over.set_result(Unavailable(reason.message))

    async def run(self) -> Unavailable:
        """Carries commands and updates until the stream breaks; returns why."""
        try:
            async with asyncio.TaskGroup() as tasks:
                reader = tasks.create_task(self._read())
                writer = tasks.create_task(self._write())
                try:
                    reason = await self._over
                finally:
                    reader.cancel()
                    writer.cancel()
            return reason
        finally:
            self._call.cancel()
            self.break_off(Unavailable(f"{self._peer}: the router has closed the connection"))
            for call in list(self._calls.values()):
                self._forget(call)
                call.inbox.put((call, self._over.result()))

    async def _read(self) -> None:
        reason: RelevoError = Unavailable(f"{self._peer} ended the stream")
        try:
            with relevo_errors(self._peer):
                async for updates in self._call:
                    if updates.HasField("load"):
                        self._load.reported(updates.load, asyncio.get_running_loop().time())
                    for update in updates.updates:
                        self._deliver(update)
        except RelevoError as error:
            reason = error
        finally:
            # Also when a peer's status CANCELLED reaches us as a CancelledError that nobody here asked for.
            self.break_off(reason)

    async def _write(self) -> None:
        while True:
            command = await self._commands.get()
            try:
                await self._call.write(command)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return  # the stream is over; _read learns why

    def _deliver(self, update: Update) -> None:
        call = self._calls.get(update.handle)
        if call is None:
            return  # cancelled while this was on its way
        kind = update.WhichOneof("update")
        if kind == "ended":
            self._judge(call, update.ended)
            self._forget(call)
        else:
            call.has_begun = True
        if kind in _FIRST_TOKENS:
            self._load.computed(call.handle, asyncio.get_running_loop().time())
            self._breaker.worked(call.handle)
        if not call.inbox.put((call, update)):
            self.cancel(call)

    def _judge(self, call: WorkerCall, ended: messages_pb2.Ended) -> None:
        """One that failed on the way may have failed for others: for the agent, say. That is no verdict."""
        if ended.error.code != _UNAVAILABLE:
            self._breaker.worked(call.handle)
        elif not (call.has_begun or self._load.report.draining):
            self._breaker.refused(call.handle, asyncio.get_running_loop().time())

    def _forget(self, call: WorkerCall) -> None:
        call.ended = True
        del self._calls[call.handle]
        self._breaker.left(call.handle)
        if not self._calls:
            self.idle.set()
        self._load.ended(call.handle, asyncio.get_running_loop().time())
