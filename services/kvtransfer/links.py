"""Links to other agents, pulling end: a control channel, and the transport that was quickest when they were probed.

A link is made when the first pull needs it, serves all pulls from that agent, and is made anew after it broke: when the
agent was started again, when a data connection broke, or when nobody used it for a while. Its life is that of the
KvLink.Open stream, by which both ends notice that the other is gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass

import grpc.aio

from relevo.core.errors import RelevoError, Unavailable
from relevo.core.sizes import format_size
from services.common.errors import relevo_errors
from services.common.grpc import make_channel
from services.common.security import NO_SECURITY, Security
from services.kvtransfer.link_counters import LinkCounters
from services.kvtransfer.transports import Figures, Puller
from services.pb import kvlink_pb2, kvlink_pb2_grpc

logger = logging.getLogger(__name__)

TYPICAL_BLOCK_BYTES = 2 << 20  # the transport that brings a block of this size first is taken
_CONNECT_SECONDS = 3.0  # until the welcome: a source that takes longer hangs
_PROBE_SECONDS = 5.0  # for one transport, its connecting included
_IDLE_SECONDS = 300.0

LinkCall = grpc.aio.StreamStreamCall[kvlink_pb2.LinkRequest, kvlink_pb2.LinkReply]
OpenPuller = Callable[[kvlink_pb2.TransportOffer, kvlink_pb2.LinkWelcome], Puller]
"""Makes the pulling end for an offer, connecting when it is probed. Raises Unavailable."""


@dataclass(frozen=True)
class Link:
    """A connected source agent."""

    address: str
    incarnation: str
    channel: grpc.aio.Channel
    puller: Puller
    figures: Figures
    reason: str  # why this transport
    probes: Mapping[str, Figures]  # of each transport that answered


class Links:
    """All links of this agent, as the pulling end. address and incarnation are our own.

    floor: bytes a second; a link that is slower is a warning
    """

    def __init__(
        self,
        pullers: Mapping[str, OpenPuller],
        *,
        address: str,
        incarnation: str,
        floor_bytes_per_second: float,
        security: Security = NO_SECURITY,
        idle_seconds: float = _IDLE_SECONDS,
    ) -> None:
        self.counters = LinkCounters()
        self.address = address
        self._pullers = pullers
        self._incarnation = incarnation
        self.floor = floor_bytes_per_second
        self._security = security
        self._idle_seconds = idle_seconds
        self._group: asyncio.TaskGroup | None = None
        self._slots: dict[str, _Slot] = {}
        self._incarnations: dict[str, str] = {}  # last seen, by address

    async def run(self) -> None:
        """Keep links alive until cancelled; then all are closed."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            await asyncio.Event().wait()

    @property
    def open_links(self) -> list[Link]:
        return [slot.link for slot in list(self._slots.values()) if slot.link is not None]

    def bytes_per_second(self, address: str) -> float:
        """Measured when the link was opened; 0 if there is none."""
        slot = self._slots.get(address)
        return slot.link.figures.bytes_per_second if slot is not None and slot.link is not None else 0.0

    def transport(self, address: str) -> str:
        """ "": there is no link."""
        slot = self._slots.get(address)
        return slot.link.puller.name if slot is not None and slot.link is not None else ""

    @asynccontextmanager
    async def to(self, address: str) -> AsyncIterator[Link]:
        """A link, made if there is none; it is not idle until the block is left. Raises Unavailable, Mismatch."""
        if self._group is None:
            raise Unavailable("this agent is starting or ending")
        slot = self._slots.get(address)
        if slot is None:
            slot = self._slots[address] = _Slot()
            slot.task = self._group.create_task(self._keep(address, slot), name=f"link to {address}")
        slot.num_users += 1
        slot.changed.set()
        try:
            yield await slot.opened()
        finally:
            slot.num_users -= 1
            slot.changed.set()

    def broke(self, link: Link) -> None:
        """A pull says that the data connections are of no use any more: the next one gets a new link."""
        slot = self._slots.get(link.address)
        if slot is not None and slot.link is link:
            self._forget(link.address, slot)
            slot.is_broken = True
            slot.changed.set()

    async def _keep(self, address: str, slot: _Slot) -> None:
        """One link's life."""
        try:
            async with AsyncExitStack() as stack:
                link, call = await self._open(address, stack)
                slot.opens(link)
                watching = asyncio.create_task(_until_ended(call))
                stack.push_async_callback(_end, watching)
                await self._until_over(slot, watching)
                self._forget(address, slot)
                if watching.done() or slot.is_broken:
                    self.counters.num_broken += 1
                    logger.warning("the link to %s broke", address)
                else:
                    logger.info("the link to %s was idle: closed", address)
                while slot.num_users and not slot.is_broken:
                    # Its control stream is gone, so the source has cut off the data; pulls end by themselves.
                    await slot.wait_for_change()
        except RelevoError as error:
            slot.fails(error)
        finally:
            self._forget(address, slot)
            slot.fails(Unavailable(f"the link to {address} was closed"))

    async def _until_over(self, slot: _Slot, watching: asyncio.Task[None]) -> None:
        """Until it breaks, or was idle for long enough."""
        while not slot.is_broken and not watching.done():
            waiting = asyncio.create_task(slot.wait_for_change())
            timeout = None if slot.num_users else self._idle_seconds
            try:
                done, _ = await asyncio.wait((waiting, watching), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            finally:
                await _end(waiting)
            if not done and not slot.num_users:
                return

    async def _open(self, address: str, stack: AsyncExitStack) -> tuple[Link, LinkCall]:
        """What is opened is on the stack."""
        peer = f"kvtransfer agent {address}"
        channel = make_channel(address, self._security)
        stack.push_async_callback(channel.close)
        call: LinkCall = kvlink_pb2_grpc.KvLinkStub(channel).Open()
        stack.callback(call.cancel)
        hello = kvlink_pb2.LinkHello(agent_address=self.address, incarnation=self._incarnation)
        welcome = await _exchange(call, hello, peer)
        link = await self._choose(address, channel, welcome, stack)
        chosen = kvlink_pb2.LinkChosen(
            transport=link.puller.name,
            bytes_per_second=link.figures.bytes_per_second,
            latency_seconds=link.figures.latency_seconds,
            num_connections=link.figures.num_connections,
            reason=link.reason,
        )
        with relevo_errors(peer), suppress(asyncio.InvalidStateError):  # it has ended: whoever watches will see
            await call.write(kvlink_pb2.LinkRequest(chosen=chosen))
        self._log(link)
        self.counters.num_opened += 1
        return link, call

    async def _choose(
        self, address: str, channel: grpc.aio.Channel, welcome: kvlink_pb2.LinkWelcome, stack: AsyncExitStack
    ) -> Link:
        """Probe every transport that both ends have. Raises Unavailable if none works."""
        found: list[tuple[Puller, Figures]] = []
        notes: list[str] = []
        for offer in welcome.offers:
            if offer.transport not in self._pullers:
                notes.append(f"{offer.transport} not here")
                continue
            try:
                async with asyncio.timeout(_PROBE_SECONDS):
                    puller = self._pullers[offer.transport](offer, welcome)
                    stack.push_async_callback(puller.close)
                    found.append((puller, await puller.probe()))
                notes.append(f"{offer.transport} {describe(found[-1][1])}")
                self.counters.count_probe(offer.transport, "measured")
            except (Unavailable, TimeoutError) as error:
                self.counters.count_probe(offer.transport, "failed")
                notes.append(f"{offer.transport} failed: {error or f'no answer within {_PROBE_SECONDS:g} s'}")
        if not found:
            raise Unavailable(f"no data transport to {address} works: {'; '.join(notes) or 'it offers none'}")
        best, figures = min(found, key=lambda each: each[1].seconds_for(TYPICAL_BLOCK_BYTES))
        for puller, _ in found:
            if puller is not best:
                await puller.close()
        why = f"quickest for a block of {format_size(TYPICAL_BLOCK_BYTES)}" if len(found) > 1 else "the only one"
        probes = {puller.name: measured for puller, measured in found}
        return Link(address, welcome.incarnation, channel, best, figures, f"{why} ({'; '.join(notes)})", probes)

    def _log(self, link: Link) -> None:
        before = self._incarnations.get(link.address)
        if before not in (None, link.incarnation):
            logger.warning("%s was started again", link.address)
        self._incarnations[link.address] = link.incarnation
        logger.info("link to %s: %s, %s: %s", link.address, link.puller.name, describe(link.figures), link.reason)
        if link.figures.bytes_per_second < self.floor:
            logger.warning(
                "the link to %s is slow: %s brings %.1f MB/s, less than --link-floor %.1f MB/s",
                link.address,
                link.puller.name,
                link.figures.bytes_per_second / 1e6,
                self.floor / 1e6,
            )

    def _forget(self, address: str, slot: _Slot) -> None:
        """The next pull makes a new link."""
        if self._slots.get(address) is slot:
            del self._slots[address]
        slot.link = None


class _Slot:
    """A link that is being made, or there, and who uses it."""

    def __init__(self) -> None:
        self.link: Link | None = None
        self.num_users = 0
        self.is_broken = False
        self.changed = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self._opened: asyncio.Future[Link] = asyncio.get_running_loop().create_future()

    def opens(self, link: Link) -> None:
        self.link = link
        self._opened.set_result(link)

    def fails(self, error: RelevoError) -> None:
        if not self._opened.done():
            self._opened.set_exception(error)
            self._opened.exception()  # seen, if nobody waits any more

    def opened(self) -> Awaitable[Link]:
        return asyncio.shield(self._opened)

    async def wait_for_change(self) -> None:
        await self.changed.wait()
        self.changed.clear()


def describe(figures: Figures) -> str:
    connections = f", {figures.num_connections} connections" if figures.num_connections > 1 else ""
    return f"{figures.bytes_per_second / 1e6:.1f} MB/s, {figures.latency_seconds * 1000:.2f} ms{connections}"


async def _exchange(call: LinkCall, hello: kvlink_pb2.LinkHello, peer: str) -> kvlink_pb2.LinkWelcome:
    try:
        async with asyncio.timeout(_CONNECT_SECONDS):
            with relevo_errors(peer):
                with suppress(asyncio.InvalidStateError):  # it has failed already: read() tells why
                    await call.write(kvlink_pb2.LinkRequest(hello=hello))
                reply = await call.read()
    except TimeoutError:
        raise Unavailable(f"{peer} does not answer within {_CONNECT_SECONDS:g} s") from None
    if not isinstance(reply, kvlink_pb2.LinkReply):
        raise Unavailable(f"{peer} ended the link at once")
    return reply.welcome


async def _until_ended(call: LinkCall) -> None:
    with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        while await call.read() is not grpc.aio.EOF:
            pass


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
