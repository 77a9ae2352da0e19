"""One reader's stream: OpenFetch, then blocks as they are sealed, here or at another agent, until all is answered."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import grpc
import grpc.aio

from relevo.core.errors import DeadlineExceeded, Exhausted, InvalidRequest, RelevoError
from services.kvtransfer.direct_places import tell_places
from services.kvtransfer.links import Links
from services.kvtransfer.publish_session import FIRST_MESSAGE_SECONDS, check_names, read_within
from services.kvtransfer.pull import pull_blocks
from services.kvtransfer.reader import Reader
from services.kvtransfer.store import Store
from services.kvtransfer.tiers.cascade import Tiers
from services.pb import kvtransfer_pb2

_MAX_ANSWERS = 4096  # in one message: 100 KB
_MAX_TIMEOUT_MS = 3_600_000
_ABORTED: int = grpc.StatusCode.ABORTED.value[0]

FetchContext = grpc.aio.ServicerContext[kvtransfer_pb2.FetchRequest, kvtransfer_pb2.FetchReply]


async def read_open_fetch(context: FetchContext) -> kvtransfer_pb2.OpenFetch | None:
    """The first message; None if the caller left without one."""
    request = await read_within(context, FIRST_MESSAGE_SECONDS, "the first message")
    if request is None:
        return None
    if request.WhichOneof("request") != "open":
        raise InvalidRequest("the first message must be OpenFetch", "request")
    opened: kvtransfer_pb2.OpenFetch = request.open
    check_names(opened.block_hashes)
    if not 1 <= opened.timeout_ms <= _MAX_TIMEOUT_MS:
        raise InvalidRequest(f"timeout_ms is {opened.timeout_ms}: 1 to {_MAX_TIMEOUT_MS} is right", "timeout_ms")
    return opened


class FetchSession:
    """Serves one reader. Pins and, if it pulls, its lease end with run()."""

    def __init__(
        self,
        store: Store,
        tiers: Tiers,
        reader: Reader,
        context: FetchContext,
        links: Links,
        pin_seconds: float,
    ) -> None:
        self._store = store
        self._tiers = tiers
        self._reader = reader
        self._context = context
        self._links = links
        self._pin_seconds = pin_seconds
        self._source = ""
        self._is_direct = False
        self._first = True
        self._requests_ended = False
        self._error: RelevoError | None = None

    async def run(self, opened: kvtransfer_pb2.OpenFetch, source_agent_address: str) -> None:
        """source_agent_address: "" for this agent itself."""
        timeout_seconds = opened.timeout_ms / 1000
        self._source = source_agent_address
        self._is_direct = opened.direct
        names = list(opened.block_hashes)
        work: list[Coroutine[Any, Any, None]] = [self._read_requests()]
        lease_id: int | None = None
        self._store.count_hits(names)
        await self._tiers.load(names)
        if source_agent_address:
            lease_id, pull = self._open_pull(names, source_agent_address, timeout_seconds)
            work += [pull] if pull is not None else []
        else:
            self._reader.request(range(len(names)))
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(coroutine) for coroutine in work]
                try:
                    await self._answer(timeout_seconds)
                except RelevoError as error:
                    self._error = error
                for task in tasks:
                    task.cancel()
        finally:
            if lease_id is not None:
                self._store.end_lease(lease_id, _ABORTED)  # for a pull that was cancelled before it began
        if self._error is not None:
            raise self._error

    def _open_pull(
        self, names: list[bytes], source: str, timeout_seconds: float
    ) -> tuple[int | None, Coroutine[Any, Any, None] | None]:
        """Take what is here or on its way, and reserve slots for the rest, to be pulled."""
        table = self._store.table
        here = [index for index, name in enumerate(names) if table.is_sealed(name) or table.is_granted(name)]
        absent = sorted(set(range(len(names))) - set(here))
        self._reader.request(here)
        if not absent:
            return None, None
        to_pull = [names[index] for index in absent]
        try:
            lease_id, announcement = self._store.announce(to_pull)
        except Exhausted:
            self._reader.give_up(absent, grpc.StatusCode.RESOURCE_EXHAUSTED)
            return None, None
        self._reader.request(absent)
        return lease_id, pull_blocks(self._store, self._links, lease_id, announcement, to_pull, source, timeout_seconds)

    async def _answer(self, timeout_seconds: float) -> None:
        now = asyncio.get_running_loop().time
        deadline = now() + timeout_seconds
        answered = False
        while True:
            await self._send_answers()
            if self._error is not None or self._reader.finished:
                return
            if self._reader.all_answered:
                if self._requests_ended:
                    return
                if not answered:
                    answered, deadline = True, now() + self._pin_seconds
            try:
                async with asyncio.timeout_at(deadline):
                    await self._reader.wait()
            except TimeoutError:
                if answered:
                    self._store.counters.pins_expired += 1
                    raise DeadlineExceeded(
                        f"blocks were pinned for {self._pin_seconds:g} s after the last came"
                    ) from None
                self._reader.expire()

    async def _send_answers(self) -> None:
        while True:
            refs, missing = self._reader.take(_MAX_ANSWERS)
            if not (refs or missing or self._first):
                return
            reply = kvtransfer_pb2.FetchReply(
                blocks=[kvtransfer_pb2.BlockRef(index=ref.index, slot=ref.slot, checksum=ref.checksum) for ref in refs],
                missing=[kvtransfer_pb2.MissingBlock(index=block.index, code=block.code) for block in missing],
            )
            if self._is_direct:
                tell_places(reply, [ref.place for ref in refs])
            if self._source:
                reply.link_bytes_per_second = self._links.bytes_per_second(self._source)
                reply.transport = self._links.transport(self._source)
            if self._first:
                self._first = False
                reply.pull_token = self._reader.token
                reply.block_bytes = self._store.arena.block_bytes
            try:
                async with asyncio.timeout(self._pin_seconds):
                    await self._context.write(reply)
            except TimeoutError:
                raise DeadlineExceeded(f"the reader took no message for {self._pin_seconds:g} s") from None

    async def _read_requests(self) -> None:
        """Releases, until the reader half-closes."""
        try:
            while isinstance(request := await self._context.read(), kvtransfer_pb2.FetchRequest):
                if request.WhichOneof("request") != "release":
                    raise InvalidRequest("only Release may follow OpenFetch", "request")
                self._reader.release(request.release.indices, request.release.corrupt)
        except RelevoError as error:
            self._error = error
        self._requests_ended = True
        self._reader.wake()
