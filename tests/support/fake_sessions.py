"""The inside of the fake workers: what they are told to do, what they note down, and one router's stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from relevo.core.errors import RelevoError
from services.common.errors import error_to_proto
from services.pb import messages_pb2


@dataclass(frozen=True, slots=True)
class Entry:
    """Something that arrived. command: the message, None for a watch or the end of a stream."""

    worker_id: str
    what: str
    handle: int = 0
    command: Any = None


class Journal:
    """Everything that arrived at the workers that share it, in order."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._changed = asyncio.Event()

    def add(self, entry: Entry) -> None:
        self.entries.append(entry)
        self._changed.set()
        self._changed = asyncio.Event()

    def names(self) -> list[str]:
        """Commands as "worker what", without watches and ends of streams."""
        return [f"{entry.worker_id} {entry.what}" for entry in self.entries if entry.command is not None]

    def all(self, worker_id: str, what: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.worker_id == worker_id and entry.what == what]

    async def wait(self, worker_id: str, what: str, count: int = 1) -> Entry:
        """The count-th entry of that kind, as soon as it is there."""
        while len(found := self.all(worker_id, what)) < count:
            await self._changed.wait()
        return found[count - 1]


@dataclass(kw_only=True)
class Behaviour:
    """What a fake does with every request; may be changed between requests.

    refuse: the request ends with this at once
    gates: stage → event that is waited for before it. Prefill: announce, first_token, end. Decode: accept, tokens,
        token-1 (before the second one), end
    fail: stage → error that the request ends with instead
    die_at: a stage at which the stream breaks, with all of its requests
    num_cached_blocks: leading blocks that the worker says it has
    finish_reason: of Ended; None: LENGTH
    """

    refuse: RelevoError | None = None
    gates: dict[str, asyncio.Event] = field(default_factory=dict)
    fail: dict[str, RelevoError] = field(default_factory=dict)
    die_at: str | None = None
    num_cached_blocks: int = 0
    finish_reason: messages_pb2.FinishReason.ValueType = messages_pb2.FINISH_REASON_LENGTH
    step_seconds: float = 0.0
    prefill_tokens_per_second: float = 0.0  # 0: at once


class Died(Exception):
    """The stream breaks."""


class Session:
    """One stream of a router: a task a request, and one writer at a time."""

    def __init__(
        self,
        worker_id: str,
        journal: Journal,
        load: messages_pb2.Load,
        serve: Callable[[Session, int, asyncio.Queue[Any]], Awaitable[None]],
        context: grpc.aio.ServicerContext[Any, Any],
        make_updates: Callable[..., Any],
        make_update: Callable[..., Any],
    ) -> None:
        self._worker_id = worker_id
        self._journal = journal
        self._load = load
        self._serve_request = serve
        self._context = context
        self._make_updates = make_updates
        self._make_update = make_update
        self._writing = asyncio.Lock()
        self._requests: dict[int, tuple[asyncio.Queue[Any], asyncio.Task[None]]] = {}

    async def run(self, commands: AsyncIterator[Any]) -> None:
        worker_id, journal = self._worker_id, self._journal
        try:
            async with asyncio.TaskGroup() as tasks:
                async for command in commands:
                    what = command.WhichOneof("command")
                    journal.add(Entry(worker_id, what, command.handle, command))
                    if what == "submit":
                        queue: asyncio.Queue[Any] = asyncio.Queue()
                        task = tasks.create_task(self._serve(command.handle, queue))
                        self._requests[command.handle] = queue, task
                    if command.handle not in self._requests:
                        continue
                    queue, task = self._requests[command.handle]
                    if what == "cancel":
                        task.cancel()
                    else:
                        queue.put_nowait(command)
        except* Died:
            pass
        finally:
            journal.add(Entry(worker_id, "stream_end"))
        await self._context.abort(grpc.StatusCode.UNAVAILABLE, f"{worker_id} died")

    async def send(self, update: Any) -> None:
        async with self._writing:
            await self._context.write(self._make_updates(updates=[update], load=self._load))

    async def _serve(self, handle: int, commands: asyncio.Queue[Any]) -> None:
        try:
            await self._serve_request(self, handle, commands)
        except RelevoError as error:
            ended = messages_pb2.Ended(error=error_to_proto(error))
            await self.send(self._make_update(handle=handle, ended=ended))
        finally:
            del self._requests[handle]
