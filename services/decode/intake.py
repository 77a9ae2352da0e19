"""What a request waits for before it can step: KV from elsewhere, and, if split, the token that prefill sampled."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from relevo.core.errors import DeadlineExceeded
from relevo.core.request import Request
from relevo.engine.step_result import Reserved
from services.decode.stages import DecodeStages
from services.worker.receiving import BlockReceiver, Receiving
from services.worker.worker import Worker

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TakenIn:
    """What there is to resume with. token_ids: the first token, or none if it is to be sampled here."""

    num_computed_tokens: int
    token_ids: list[int]


class Intake:
    """Takes in one request. The router's commands come in any order, before or after run() has begun."""

    def __init__(self, worker: Worker, receiver: BlockReceiver, request: Request, stages: DecodeStages) -> None:
        loop = asyncio.get_running_loop()
        self._worker = worker
        self._receiver = receiver
        self._request = request
        self._stages = stages
        self._source_address: asyncio.Future[str | None] = loop.create_future()  # None: nothing will come
        self._first_token: asyncio.Future[int | None] = loop.create_future()  # None: sampled here
        self._is_local = False
        self._receiving: Receiving | None = None
        self._num_before_first_token = 0  # blocks
        self._first_token_at: float | None = None
        self._fetching: asyncio.Timeout | None = None

    def fetch_kv(self, source_agent_address: str) -> None:
        _settle(self._source_address, source_agent_address)

    def first_token(self, token_id: int) -> None:
        """Prefill has computed everything: what is still to come is on its way, and that takes no minutes."""
        if self._receiving is not None:
            self._num_before_first_token = self._receiving.num_contiguous
        self._first_token_at = time.monotonic()
        _settle(self._first_token, token_id)
        if self._fetching is not None:
            self._fetching.reschedule(self._transfer_deadline())

    def sample_here(self) -> None:
        """No first token comes: nobody else computes this prompt."""
        _settle(self._first_token, None)

    def compute_locally(self) -> None:
        """Stop waiting, for the blocks and for the token: go on with what has arrived."""
        self._is_local = True
        _settle(self._source_address, None)
        _settle(self._first_token, None)
        if self._fetching is not None:
            self._fetching.reschedule(asyncio.get_running_loop().time())

    async def run(self, reserved: Reserved) -> TakenIn:
        """Wait until the request can step. When this returns or raises, nobody writes into its blocks any more.

        Raises DeadlineExceeded when the other side keeps it waiting beyond --handover-timeout-seconds.
        """
        limit = self._worker.settings.handover_timeout_seconds
        try:
            async with asyncio.timeout(limit):
                num_blocks = await self._receive(reserved)
                first_token = await self._first_token
        except TimeoutError:
            missing = "the first token" if self._source_address.done() else "word of where its KV is"
            raise DeadlineExceeded(f"{missing} did not come within {limit:g} s") from None
        self._measure()
        self._stages.resumed(self._first_token_at)
        return TakenIn(num_blocks * self._request.block_size, [] if first_token is None else [first_token])

    async def _receive(self, reserved: Reserved) -> int:
        """Fill the reserved blocks; the number of leading ones that are filled."""
        request = self._request
        num_cached_blocks = reserved.num_cached_tokens // request.block_size
        names = request.block_hashes(request.num_tokens)
        if num_cached_blocks == len(names):
            return num_cached_blocks
        source_address = await self._source_address
        if source_address is None or self._is_local:
            return num_cached_blocks
        self._receiving = receiving = self._receiver.receive(
            names[num_cached_blocks:], reserved.block_ids[num_cached_blocks:], source_address
        )
        try:
            async with asyncio.timeout_at(self._transfer_deadline()) as self._fetching:
                await receiving.run()
        except TimeoutError:
            logger.debug("stopped waiting for blocks", extra={"request_id": request.request_id})
        finally:
            self._fetching = None
            self._stages.received(receiving, num_cached_blocks)
        return num_cached_blocks + receiving.num_contiguous

    def _measure(self) -> None:
        """How much of the hand-over was hidden behind prefill's computing."""
        if self._receiving is not None and self._first_token_at is not None and not self._is_local:
            tail_seconds = max(0.0, self._receiving.last_arrival - self._first_token_at)
            num_blocks = self._receiving.num_contiguous
            self._worker.transfers.handed_over(num_blocks, self._num_before_first_token, tail_seconds)

    def _transfer_deadline(self) -> float | None:
        """In the loop's time; None while prefill computes: its queue may be long, and a writer that dies is noticed."""
        if not self._first_token.done():
            return None
        return asyncio.get_running_loop().time() + self._worker.settings.transfer_timeout_seconds


def _settle(future: asyncio.Future[str | None] | asyncio.Future[int | None], value: str | int | None) -> None:
    """The first answer counts."""
    if not future.done():
        future.set_result(value)  # type: ignore[arg-type]  # each caller gives its own future's type
