"""A worker as this router sees it: found, lost and found again under one address."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Literal

import grpc.aio

from relevo.core.block_hash import BlockHash
from relevo.core.errors import DeadlineExceeded, Mismatch, RelevoError, Unauthenticated, Unavailable
from relevo.core.placement import WorkerView
from relevo.core.prefix_index import PrefixIndex
from relevo.core.worker_load import PromptWork, WorkerLoad
from services.common.errors import relevo_errors
from services.common.grpc import make_channel
from services.common.security import NO_SECURITY, Security
from services.common.stuck import STUCK_SECONDS, is_stuck
from services.pb import messages_pb2, worker_pb2, worker_pb2_grpc
from services.router.agents import AgentBlocks, Agents
from services.router.block_watch import BlockWatch, follow_blocks, is_our_own_cancellation
from services.router.breaker import CircuitBreaker
from services.router.request_stream import Command, RequestInbox, RequestStream, WorkerCall, WorkerKind

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0  # how long one GetInfo waits for the worker to listen
SILENCE_SECONDS = 15.0  # a worker says something every second; one that is silent for so long hangs
MIN_BACKOFF_SECONDS = 0.05
MAX_BACKOFF_SECONDS = 1.0
REFUSED_SECONDS = 10.0  # until one that does not want us is asked again: it may be started anew, with our token

# What gRPC says, in words alone, when the peer's certificate is not good, or ours is not, or one side has no TLS.
_NO_HANDSHAKE = ("Tls handshake failed", "Socket closed")
_CHECK_TLS = "--tls-cert, --tls-key and --tls-ca of the router and of this worker must fit each other"


Condition = Literal["ready", "lost", "leaving", "draining", "stuck", "tripped"]


class WorkerConnection:
    """One channel: GetInfo, then a watch over its blocks and the stream of requests, until the stream breaks; again.

    info: of the last connection, None before the first
    complaint: why there is no connection; None if there is one, or none was tried
    is_leaving: discovery names it no longer: what is there ends there, and nothing new begins
    """

    def __init__(
        self,
        address: str,
        kind: WorkerKind,
        index: PrefixIndex,
        agents: Agents,
        *,
        security: Security = NO_SECURITY,
        silence_seconds: float = SILENCE_SECONDS,
        stuck_seconds: float = STUCK_SECONDS,
        on_connected: Callable[[], None] = lambda: None,
    ) -> None:
        self.address = address
        self.kind = kind
        self.info: worker_pb2.WorkerInfo | None = None
        self.complaint: str | None = None
        self.is_leaving = False
        self.load = WorkerLoad(messages_pb2.Load())
        self.breaker = CircuitBreaker()
        self._index = index
        self._agents = agents
        self._on_connected = on_connected
        self._security = security
        self._silence_seconds = silence_seconds
        self._stuck_seconds = stuck_seconds
        self._is_stuck = False  # by its last word, which may be of the last connection
        self._discovered_incarnation = ""
        self._stream: RequestStream | None = None
        self._connected = asyncio.Event()
        self._is_refused = False

    @property
    def is_connected(self) -> bool:
        return self._stream is not None

    @property
    def num_requests(self) -> int:
        """Of this router, on this worker."""
        return self._stream.num_requests if self._stream is not None else 0

    def condition(self, now: float) -> Condition:
        """Whether requests may be placed here, or why not. now: on the event loop's clock."""
        if self._stream is None:
            return "lost"
        if self.is_leaving:
            return "leaving"
        if self.load.report.draining:
            return "draining"
        if self._is_stuck:
            return "stuck"
        return "ready" if self.breaker.allows(now) else "tripped"

    async def wait_connected(self) -> None:
        await self._connected.wait()

    async def wait_idle(self) -> None:
        """Until no request of ours is there, if only because the connection broke."""
        if self._stream is not None:
            await self._stream.idle.wait()

    def discovered(self, incarnation: str) -> None:
        """What discovery says now of who listens there; "" = nothing.

        A process that has lost its address to another one may never say so: its host may be off.
        """
        before, self._discovered_incarnation = self._discovered_incarnation, incarnation
        if self._stream is not None and self.info is not None and before == self.info.incarnation != incarnation:
            self._stream.break_off(Unavailable(f"{self.address}: another process has taken its place"))

    def submit(self, command: Command, inbox: RequestInbox, work: PromptWork) -> WorkerCall:
        """A new request on this worker. Raises Unavailable if it is not connected."""
        if self._stream is None:
            raise Unavailable(f"{self.kind.name} worker {self.address} is not connected")
        return self._stream.submit(command, inbox, work)

    def view(
        self, hashes: Sequence[BlockHash], num_cached_blocks: int, at_agents: AgentBlocks, now: float
    ) -> WorkerView:
        """For placement. Only of workers that were connected once.

        hashes: of the prompt's blocks, of which num_cached_blocks are in the worker's pool
        """
        assert self.info is not None
        report = self.load.report
        agent_address = self.info.agent_address
        remote_agent, num_remote_blocks = at_agents.best_but(agent_address) if agent_address else ("", 0)
        return WorkerView(
            address=self.address,
            fingerprint=self.info.layout_fingerprint,
            block_size=self.info.block_size,
            block_bytes=self.info.block_bytes,
            has_agent=bool(self.info.agent_address),
            max_num_seqs=self.info.max_num_seqs,
            num_requests=self.load.num_requests,
            num_waiting_tokens=self.load.num_waiting_tokens(now),
            num_free_blocks=report.num_free_blocks,
            prefill_tokens_per_second=report.prefill_tokens_per_second,
            step_seconds=report.step_seconds,
            step_seconds_per_request=report.step_seconds_per_request,
            transfer_bytes_per_second=report.transfer_bytes_per_second,
            num_cached_blocks=max(num_cached_blocks, self.load.num_expected_blocks(hashes)),
            agent_address=agent_address,
            num_agent_blocks=at_agents.at(agent_address) if agent_address else 0,
            remote_agent=remote_agent,
            num_remote_blocks=num_remote_blocks,
        )

    async def run(self) -> None:
        """Stays connected, until cancelled."""
        channel = make_channel(self.address, self._security)
        loop = asyncio.get_running_loop()
        backoff_seconds = MIN_BACKOFF_SECONDS
        try:
            while True:
                since = loop.time()
                if await self._try(channel) and loop.time() - since > MAX_BACKOFF_SECONDS:
                    backoff_seconds = MIN_BACKOFF_SECONDS  # it had worked; one that breaks at once is not hurried
                await asyncio.sleep(REFUSED_SECONDS if self._is_refused else backoff_seconds)
                backoff_seconds = min(2 * backoff_seconds, MAX_BACKOFF_SECONDS)
        finally:
            self._index.forget(self.address)
            await channel.close()

    async def _try(self, channel: grpc.aio.Channel) -> bool:
        """Connects, and returns when the connection has ended; False if there was none."""
        try:
            info = await self._get_info(channel)
        except RelevoError as error:
            self._is_refused = isinstance(error, Unauthenticated)
            if error.message != self.complaint:  # once, and not at every attempt
                self.complaint = error.message
                level = logging.ERROR if isinstance(error, Mismatch | Unauthenticated) else logging.INFO
                logger.log(level, "waiting for %s worker %s: %s", self.kind.name, self.address, error.message)
            return False
        self._is_refused, self.complaint = False, None
        reason = await self._serve(channel, info)
        if self.is_leaving or self.load.report.draining:
            logger.info("%s worker %s has left: %s", self.kind.name, info.worker_id, reason.message)
        else:
            logger.warning("lost %s worker %s: %s", self.kind.name, info.worker_id, reason.message)
            self.breaker.failed(asyncio.get_running_loop().time())
        return True

    async def _get_info(self, channel: grpc.aio.Channel) -> worker_pb2.WorkerInfo:
        """Raises Unauthenticated if our token is not taken, Mismatch, Unavailable."""
        try:
            info = await self._ask(channel, wait_for_ready=True)
        except DeadlineExceeded:
            info = await self._ask_at_once(channel)
        if info.role != self.kind.role:
            role = worker_pb2.Role.Name(info.role)
            raise Mismatch(f"{self.address} was given as a {self.kind.name} worker and says that it is {role}")
        if not info.block_size or not info.max_num_seqs or len(info.layout_fingerprint) != 32:
            raise Mismatch(f"{self.address}: its info names no block_size, max_num_seqs or layout_fingerprint")
        return info

    async def _ask(self, channel: grpc.aio.Channel, *, wait_for_ready: bool) -> worker_pb2.WorkerInfo:
        stub = worker_pb2_grpc.WorkerStub(channel)
        with relevo_errors(self.address):
            return await stub.GetInfo(
                worker_pb2.GetInfoRequest(), timeout=CONNECT_SECONDS, wait_for_ready=wait_for_ready
            )

    async def _ask_at_once(self, channel: grpc.aio.Channel) -> worker_pb2.WorkerInfo:
        """Where nothing has connected for CONNECT_SECONDS: a call that does not wait is told why it would have to."""
        try:
            return await self._ask(channel, wait_for_ready=False)
        except Unavailable as error:
            if any(sign in error.message for sign in _NO_HANDSHAKE):
                raise Mismatch(f"{error.message}; {_CHECK_TLS}") from error
            raise

    async def _serve(self, channel: grpc.aio.Channel, info: worker_pb2.WorkerInfo) -> Unavailable:
        """One connection's life."""
        is_same = self.info is not None and self.info.incarnation == info.incarnation
        if not is_same:
            self._index.forget(self.address)  # another process: it has none of what the old one had
            self._is_stuck = False
        self.info = info
        # Whatever was sent is gone. Until it reports: idle, all free. Who drains does so to the end.
        draining = is_same and self.load.report.draining
        self.load = WorkerLoad(messages_pb2.Load(num_free_blocks=info.num_blocks, draining=draining))
        stream = RequestStream(self.kind, channel, f"{self.kind.name} worker {info.worker_id}", self.load, self.breaker)
        async with asyncio.TaskGroup() as tasks:
            watch = tasks.create_task(self._watch(channel, stream))
            self._stream = stream
            self._connected.set()
            self._agents.attached(info.agent_address)
            self._on_connected()
            logger.info("connected to %s worker %s at %s", self.kind.name, info.worker_id, self.address)
            try:
                return await stream.run()
            finally:
                self._stream = None
                self._connected.clear()
                self._agents.detached(info.agent_address)
                watch.cancel()

    async def _watch(self, channel: grpc.aio.Channel, stream: RequestStream) -> None:
        """Keeps the index right as long as the connection lasts. Silence ends the connection; the rest a new watch."""
        while True:
            try:
                await self._follow(channel, stream)
            except TimeoutError:
                stream.break_off(Unavailable(f"{self.address} was silent for {self._silence_seconds:g} s"))
                return
            except RelevoError as error:
                logger.info("watching the blocks of %s again: %s", self.address, error.message)
            except asyncio.CancelledError:
                if is_our_own_cancellation():
                    raise
            await asyncio.sleep(MIN_BACKOFF_SECONDS)

    async def _follow(self, channel: grpc.aio.Channel, stream: RequestStream) -> None:
        """One WatchBlocks call, to its end; raises as follow_blocks does."""

        def on_load(load: messages_pb2.Load) -> None:
            self.load.reported(load, asyncio.get_running_loop().time())
            self._judge_step(load, stream)

        watching = worker_pb2_grpc.WorkerStub(channel).WatchBlocks(worker_pb2.WatchBlocksRequest())
        watch = BlockWatch(self._index, self.address)
        await follow_blocks(watching, watch, self.address, self._silence_seconds, on_load)

    def _judge_step(self, load: messages_pb2.Load, stream: RequestStream) -> None:
        """A worker whose engine hangs answers and says so, but serves nobody: its requests go on elsewhere.

        The connection is made anew, to hear when it goes on: until then nothing is placed there.
        """
        was_stuck = self._is_stuck
        self._is_stuck = is_stuck(load.step_age_seconds, load.longest_step_seconds, self._stuck_seconds)
        if self._is_stuck and not was_stuck:
            stream.break_off(Unavailable(f"{self.address} is stuck: in one step for {load.step_age_seconds:.1f} s"))
        elif was_stuck and not self._is_stuck:
            logger.info("%s worker %s is not stuck any more", self.kind.name, self.address)
            self._on_connected()
