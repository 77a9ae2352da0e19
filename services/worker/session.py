"""One router's stream: commands in by handle, updates out, and every accepted request ends exactly once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import grpc.aio

from relevo.core.errors import Exhausted, InvalidRequest, RelevoError
from services.pb.decode_pb2 import DecodeCommand, DecodeUpdate, DecodeUpdates
from services.pb.messages_pb2 import Ended, Load
from services.pb.prefill_pb2 import PrefillCommand, PrefillUpdate, PrefillUpdates
from services.worker.messages import failed
from services.worker.outbox import MAX_PENDING_BYTES, Outbox
from services.worker.worker import Worker

logger = logging.getLogger(__name__)

CommandT = TypeVar("CommandT", DecodeCommand, PrefillCommand)
UpdateT = TypeVar("UpdateT", DecodeUpdate, PrefillUpdate)
UpdatesT = TypeVar("UpdatesT", DecodeUpdates, PrefillUpdates)
CommandIn = TypeVar("CommandIn", contravariant=True)

_FRAME_BYTES = 8  # an update's tag and length within its message


class ServedRequest(Protocol[CommandIn]):
    """A request as its stream sees it. Whatever happens, it ends through its Reply, once."""

    def command(self, command: CommandIn) -> None:
        """Any command but submit."""
        ...

    def cancel(self, error: RelevoError | None = None) -> None:
        """Free everything and end: with `error`, or as CANCELLED. Again, or after the end, it does nothing."""
        ...


@dataclass(frozen=True)
class Dialect(Generic[CommandT, UpdateT, UpdatesT]):
    """What differs between the workers' streams.

    start: begin to serve a submit command; RelevoError refuses it. It must not end the request before it returns.
    """

    start: Callable[[CommandT, str, Reply[UpdateT]], ServedRequest[CommandT]]
    ended: Callable[[int, Ended], UpdateT]
    message: Callable[[list[UpdateT], Load], UpdatesT]


class Reply(Generic[UpdateT]):
    """One request's way back to its router: updates in order, then one Ended."""

    def __init__(self, handle: int, send: Callable[[UpdateT], None], end: Callable[[int, Ended], None]) -> None:
        self.handle = handle
        self._send: Callable[[UpdateT], None] = send
        self._end = end
        self.has_ended = False

    def send(self, update: UpdateT) -> None:
        assert not self.has_ended, f"update after the end of {self.handle}"
        self._send(update)

    def end(self, ended: Ended) -> None:
        assert not self.has_ended, f"second end of {self.handle}"
        self.has_ended = True
        self._end(self.handle, ended)


class Session(Generic[CommandT, UpdateT, UpdatesT]):
    """Serves one stream.

    Updates of a step go out in one message; while a message is being written, what comes is collected for the next.
    A router that reads so slowly that the outbox fills is cut off with RESOURCE_EXHAUSTED: its own requests are
    cancelled, and neither the engine nor another router waits for it.
    """

    def __init__(
        self,
        worker: Worker,
        dialect: Dialect[CommandT, UpdateT, UpdatesT],
        max_pending_bytes: int = MAX_PENDING_BYTES,
    ) -> None:
        self._worker = worker
        self._dialect: Dialect[CommandT, UpdateT, UpdatesT] = dialect
        self._name = worker.next_session_name()
        self._requests: dict[int, ServedRequest[CommandT]] = {}
        self._num_submitted = 0
        self._outbox: Outbox[UpdateT] = Outbox(max_pending_bytes)
        self._tasks: list[asyncio.Task[None]] = []
        self._error: RelevoError | None = None
        self._no_requests = asyncio.Event()
        self._no_requests.set()

    async def run(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Until the router ends its side, leaves, or is cut off (then this raises why)."""
        logger.debug("stream %s opened by %s", self._name, context.peer())
        with self._worker.session(self):
            try:
                # By itself: a write that is cancelled half way would leave gRPC unsure whether they were sent.
                await context.send_initial_metadata(())
                async with asyncio.TaskGroup() as tasks:
                    self._tasks = [tasks.create_task(self._read(context)), tasks.create_task(self._write(context))]
            finally:
                self._outbox.close(discard=True)
                self.cancel_all()
                logger.debug("stream %s ended", self._name)
        if self._error is not None:
            raise self._error

    def cancel_all(self, error: RelevoError | None = None) -> None:
        for request in list(self._requests.values()):
            request.cancel(error)

    def finish(self) -> None:
        """Send what is queued, then end the stream, whatever the router still has to say."""
        self._outbox.close()
        for task in self._tasks[:1]:
            task.cancel()

    async def _read(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        while (command := await context.read()) is not grpc.aio.EOF:
            self._obey(command)
        # The router has said its last word: without it nobody could cancel any more.
        self.cancel_all()
        await self._no_requests.wait()
        self._outbox.close()

    async def _write(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        while updates := await self._outbox.take():
            await context.write(self._dialect.message(updates, self._worker.load))

    def _obey(self, command: CommandT) -> None:
        if command.WhichOneof("command") == "submit":
            self._submit(command)
        elif (request := self._requests.get(command.handle)) is not None:
            request.command(command)
        # else: it ended while the command was on its way

    def _submit(self, command: CommandT) -> None:
        handle = command.handle
        if handle in self._requests:
            self._cut_off(InvalidRequest(f"handle {handle} is in use on this stream: choose another", "handle"))
            return
        # request_id is the router's, and may come twice: after a retry, or from two routers.
        self._num_submitted += 1
        engine_id = f"{self._name}-{self._num_submitted}"
        reply: Reply[UpdateT] = Reply(handle, self._send, self._request_ended)
        try:
            self._worker.check_admission()
            request = self._dialect.start(command, engine_id, reply)
        except RelevoError as error:
            logger.debug("refused: %s", error.message, extra={"request_id": command.submit.request.request_id})
            reply.end(failed(error))
            return
        self._no_requests.clear()
        self._requests[handle] = request

    def _send(self, update: UpdateT) -> None:
        if not self._outbox.put(update, update.ByteSize() + _FRAME_BYTES):
            self._cut_off(Exhausted("the router reads its updates too slowly: its requests were cancelled"))

    def _request_ended(self, handle: int, ended: Ended) -> None:
        self._requests.pop(handle, None)
        self._send(self._dialect.ended(handle, ended))
        if not self._requests:
            self._no_requests.set()

    def _cut_off(self, error: RelevoError) -> None:
        if self._error is not None:
            return
        logger.warning("stream %s is cut off: %s", self._name, error.message)
        self._error = error
        self._outbox.close(discard=True)
        for task in self._tasks:
            task.cancel()
        # Not from here: this may be in the middle of one request's step.
        asyncio.get_running_loop().call_soon(self.cancel_all)
