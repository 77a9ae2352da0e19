"""The KV transfer agents of the fleet, and the blocks that they hold.

Agents are found through the workers that are attached to them. One whose workers are all gone is followed on as long as
it answers: what it holds can be fetched by others, and that is how a request moves off a worker that died.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress

import grpc.aio

from relevo.core.errors import RelevoError, Unauthenticated
from relevo.core.prefix_index import PrefixIndex
from services.common.errors import relevo_errors
from services.common.grpc import cancelling, make_channel
from services.common.security import NO_SECURITY, Security
from services.pb import kvtransfer_pb2, kvtransfer_pb2_grpc, worker_pb2
from services.router.block_watch import BlockWatch, follow_blocks, is_our_own_cancellation

logger = logging.getLogger(__name__)

SILENCE_SECONDS = 15.0
BACKOFF_SECONDS = 0.5
AUDIT_SECONDS = 0.5
REFUSED_SECONDS = 10.0  # until an agent that does not take our token is asked again
_PREFIX = "agent "  # its name in the index, which has workers too, under their addresses


class Agents:
    """Follows agents into the index. Tasks belong to the group that start() gets."""

    def __init__(self, index: PrefixIndex, security: Security = NO_SECURITY) -> None:
        self._index = index
        self._security = security
        self._group: asyncio.TaskGroup | None = None
        self._num_workers: dict[str, int] = {}  # by agent: connected ones, attached to it
        self._following: dict[str, grpc.aio.Channel] = {}

    def start(self, group: asyncio.TaskGroup) -> None:
        self._group = group

    def attached(self, agent_address: str) -> None:
        """A worker with this agent was connected. "": it has none."""
        if not agent_address or self._group is None:
            return
        self._num_workers[agent_address] = self._num_workers.get(agent_address, 0) + 1
        if agent_address not in self._following:
            self._following[agent_address] = make_channel(agent_address, self._security)
            self._group.create_task(self._follow(agent_address), name=f"blocks of agent {agent_address}")

    def detached(self, agent_address: str) -> None:
        """That worker was lost."""
        if agent_address in self._num_workers:
            self._num_workers[agent_address] -= 1
            if not self._num_workers[agent_address]:
                del self._num_workers[agent_address]

    @property
    def addresses(self) -> Sequence[str]:
        """Of all that are followed, in order."""
        return sorted(self._following)

    def num_known_blocks(self, address: str) -> int:
        return self._index.num_blocks(_PREFIX + address)

    async def audit(self, address: str) -> kvtransfer_pb2.AuditReply | None:
        """What one of `addresses` says of its slots; None: it does not answer."""
        channel = self._following.get(address)
        if channel is None:
            return None
        call = kvtransfer_pb2_grpc.KvTransferStub(channel).Audit(kvtransfer_pb2.AuditRequest(), timeout=AUDIT_SECONDS)
        try:
            with relevo_errors(address), cancelling(call):
                return await call
        except RelevoError:
            return None
        except asyncio.CancelledError:
            if is_our_own_cancellation():
                raise
            return None  # its channel was closed

    async def _follow(self, address: str) -> None:
        """Until it is lost while no worker is attached to it."""
        channel = self._following[address]
        complaint = ""
        try:
            while True:
                pause_seconds = BACKOFF_SECONDS
                try:
                    watching = kvtransfer_pb2_grpc.KvTransferStub(channel).WatchBlocks(worker_pb2.WatchBlocksRequest())
                    watch = BlockWatch(self._index, _PREFIX + address)
                    await follow_blocks(watching, watch, f"kvtransfer agent {address}", SILENCE_SECONDS)
                except TimeoutError:
                    complaint = _complain(address, f"it was silent for {SILENCE_SECONDS:g} s", complaint)
                except Unauthenticated as error:
                    complaint = _complain(address, error.message, complaint, logging.ERROR)
                    pause_seconds = REFUSED_SECONDS
                except RelevoError as error:
                    complaint = _complain(address, error.message, complaint)
                except asyncio.CancelledError:
                    if is_our_own_cancellation():
                        raise
                self._index.forget(_PREFIX + address)
                if address not in self._num_workers:
                    return
                await asyncio.sleep(pause_seconds)
        finally:
            del self._following[address]
            self._index.forget(_PREFIX + address)
            with suppress(asyncio.CancelledError):
                await channel.close()


class AgentBlocks:
    """What agents hold of one prompt, by a lookup in the index."""

    def __init__(self, held: Mapping[str, int]) -> None:
        self._held = held
        agents = [(count, name[len(_PREFIX) :]) for name, count in held.items() if name.startswith(_PREFIX)]
        self._most: Sequence[tuple[int, str]] = sorted(agents, reverse=True)[:2]

    def at(self, agent_address: str) -> int:
        """Leading blocks of the prompt at this agent."""
        return self._held.get(_PREFIX + agent_address, 0)

    def best_but(self, agent_address: str) -> tuple[str, int]:
        """Of the others, that which holds the most, and how many; ("", 0): none holds any."""
        return next(((address, count) for count, address in self._most if address != agent_address), ("", 0))


def _complain(address: str, reason: str, before: str, level: int = logging.INFO) -> str:
    """Once, and not at every attempt."""
    if reason != before:
        logger.log(level, "the blocks of kvtransfer agent %s are not known: %s", address, reason)
    return reason
