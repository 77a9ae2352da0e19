"""An engine without a model: the real scheduler and pool, blocks and tokens that are functions of the sequence.

A block's bytes are made from its name, and every block that a request relies on is compared with them in each step: KV
that was not handed over whole, or was written to after the hand-over, fails the test. Tokens depend on the whole
sequence, so that a token lost or repeated shows.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from numpy.typing import NDArray

from relevo.core.block_hash import BlockHash, root_hash
from relevo.core.block_pool import BlockPool
from relevo.core.errors import InvalidRequest
from relevo.core.request import FinishReason, Request
from relevo.core.sampling_params import SamplingParams
from relevo.core.schedule import SchedulerConfig
from relevo.core.scheduler import Scheduler
from relevo.engine.cache_memory import CacheMemory
from relevo.engine.config import EngineInfo
from relevo.engine.kv_cache import HostBlocks
from relevo.engine.step_result import Chunk, Computed, EndedRequest, EngineLoad, NewTokens, Reserved, StepResult
from tests.support.builders import FINGERPRINT

VOCAB_SIZE = 1000
EOS_TOKEN_ID = 0


def next_token(token_ids: Sequence[int]) -> int:
    """Never EOS."""
    digest = hashlib.sha256(repr(list(token_ids)).encode()).digest()
    return 1 + int.from_bytes(digest[:4], "little") % (VOCAB_SIZE - 1)


def continuation(prompt: Sequence[int], max_tokens: int) -> list[int]:
    token_ids = list(prompt)
    for _ in range(max_tokens):
        token_ids.append(next_token(token_ids))
    return token_ids[len(prompt) :]


def block_bytes_of(name: BlockHash, block_bytes: int) -> NDArray[np.uint8]:
    return np.frombuffer(hashlib.shake_128(name).digest(block_bytes), dtype=np.uint8)


class FakeKVCache:
    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        self.storage = np.zeros((num_blocks, block_bytes), dtype=np.uint8)
        self.memory = CacheMemory(torch.from_numpy(self.storage), None)

    def send(self, block_ids: Sequence[int], slots: Sequence[memoryview]) -> None:
        return None

    def receive(self, block_ids: Sequence[int], slots: Sequence[memoryview], after: object) -> None:
        return None

    def last_launch(self) -> None:
        return None

    def leaving(self, block_ids: Sequence[int]) -> HostBlocks:
        return nullcontext([self.storage[block_id] for block_id in block_ids])

    def arriving(self, block_ids: Sequence[int], after: object) -> HostBlocks:
        return self.leaving(block_ids)


class FakeEngine:
    """stop_after: token ids that count as EOS."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        block_bytes: int = 512,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 16,
        max_model_len: int = 200,
        eos_token_ids: tuple[int, ...] = (EOS_TOKEN_ID,),
    ) -> None:
        self.info = EngineInfo(
            model_name="fake",
            fingerprint=FINGERPRINT,
            block_size=block_size,
            block_bytes=block_bytes,
            num_blocks=num_blocks,
            max_model_len=max_model_len,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=eos_token_ids,
            max_num_seqs=max_num_seqs,
        )
        self.kv_cache = FakeKVCache(num_blocks, block_bytes)
        config = SchedulerConfig(max_num_seqs, max_num_batched_tokens, block_size, output_allowance_tokens=block_size)
        self.scheduler = Scheduler(config, BlockPool(num_blocks))
        self.num_computed_tokens = 0
        self._cancelled: list[EndedRequest] = []

    def make_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        cache_salt: str = "",
        await_kv: bool = False,
        hold_blocks: bool = False,
        num_output_tokens: int = 0,
        priority: int = 0,
    ) -> Request:
        num_prompt_tokens = len(prompt_token_ids) - num_output_tokens
        room = self.info.max_model_len - num_prompt_tokens
        if not prompt_token_ids or room <= num_output_tokens:
            raise InvalidRequest(f"a prompt of {len(prompt_token_ids)} tokens does not fit", "prompt")
        assert sampling.max_tokens is not None
        return Request(
            request_id=request_id,
            token_ids=list(prompt_token_ids),
            num_prompt_tokens=num_prompt_tokens,
            sampling=sampling,
            max_tokens=min(sampling.max_tokens, room),
            stop_token_ids=frozenset((*sampling.stop_token_ids, *self.info.eos_token_ids)),
            root_hash=root_hash(self.info.fingerprint, cache_salt=cache_salt),
            block_size=self.info.block_size,
            await_kv=await_kv,
            hold_blocks=hold_blocks,
        )

    def abort(self, request_id: str) -> None:
        request = self.scheduler.abort(request_id)
        if request is not None:
            self._cancelled.append(EndedRequest(request_id, FinishReason.CANCELLED, request.num_cached_tokens))

    def step(self) -> StepResult:
        began_at = time.monotonic()
        scheduler = self.scheduler
        output = scheduler.schedule()
        chunks = [Chunk(e.request.request_id, e.num_scheduled_tokens) for e in output.scheduled]
        for entry in output.scheduled:
            self._compute(entry.request, entry.num_scheduled_tokens)
        sampled = {e.request.request_id: next_token(e.request.token_ids) for e in output.scheduled if e.samples}
        ended = scheduler.update(output, {name: [token] for name, token in sampled.items()})
        scheduler.check()
        stored, removed = scheduler.pool.drain_events()
        cancelled, self._cancelled = self._cancelled, []
        return StepResult(
            load=self._load(),
            reserved=[
                Reserved(r.request_id, r.block_ids[: r.num_tokens // r.block_size], r.num_computed_tokens)
                for r in output.reserved
            ],
            admitted=[request.request_id for request in output.admitted],
            computed=[
                Computed(e.request.request_id, e.request.num_computed_tokens, list(e.request.block_ids))
                for e in output.scheduled
                if e.request.hold_blocks
            ],
            tokens=[NewTokens(request_id, [token_id], []) for request_id, token_id in sampled.items()],
            ended=cancelled
            + [EndedRequest(r.request_id, r.finish_reason, r.num_cached_tokens) for r in ended if r.finish_reason],
            stored=stored,
            removed=removed,
            num_scheduled_tokens=output.num_scheduled_tokens,
            chunks=chunks,
            began_at=began_at,
            ended_at=time.monotonic(),
        )

    def _compute(self, request: Request, num_tokens: int) -> None:
        block_bytes, block_size = self.info.block_bytes, request.block_size
        num_filled = request.num_computed_tokens // block_size
        names = request.block_hashes(request.num_computed_tokens + num_tokens)
        for index, name in enumerate(names):
            block_id, expected = request.block_ids[index], block_bytes_of(name, block_bytes)
            if index < num_filled:
                found = self.kv_cache.storage[block_id]
                assert np.array_equal(found, expected), f"{request.request_id}: block {index} is not what it should be"
            else:
                self.kv_cache.storage[block_id] = expected
        self.num_computed_tokens += num_tokens

    def _load(self) -> EngineLoad:
        scheduler = self.scheduler
        unfinished = [*scheduler.running, *scheduler.waiting, *scheduler.waiting_for_kv.values()]
        return EngineLoad(
            num_running=len(scheduler.running) + len(scheduler.waiting_for_kv),
            num_waiting=len(scheduler.waiting),
            num_waiting_tokens=sum(request.num_uncomputed_tokens for request in unfinished),
            num_free_blocks=scheduler.pool.num_free_blocks,
        )


class FakeEngineThread:
    """Steps in the loop itself. pause() keeps commands queued and nothing stepping until go(); step_once() does one."""

    def __init__(self, engine: FakeEngine, on_step: Callable[[StepResult], None]) -> None:
        self.engine = engine
        self.error: Exception | None = None
        self._on_step = on_step
        self._commands: list[Callable[[], object]] = []
        self._is_paused = False
        self._handle: asyncio.Handle | None = None
        self._ended: asyncio.Future[None] | None = None

    def start(self) -> None:
        self._ended = asyncio.get_running_loop().create_future()

    async def stop(self) -> None:
        self.pause()
        assert self._ended is not None
        if not self._ended.done():
            self._ended.set_result(None)

    async def wait(self) -> None:
        assert self._ended is not None
        await asyncio.shield(self._ended)

    def die(self, error: Exception) -> None:
        self.error = error
        self.pause()
        assert self._ended is not None
        self._ended.set_exception(error)

    def submit(self, request: Request) -> None:
        self._command(lambda: self.engine.scheduler.add(request))

    def resume(self, request_id: str, num_computed_tokens: int, token_ids: list[int]) -> None:
        self._command(lambda: self.engine.scheduler.resume(request_id, num_computed_tokens, token_ids))

    def abort(self, request_id: str) -> None:
        self._command(lambda: self.engine.abort(request_id))

    def release(self, request_id: str) -> None:
        self._command(lambda: self.engine.scheduler.release(request_id))

    async def pin(self, names: Sequence[BlockHash]) -> dict[BlockHash, int]:
        return self.engine.scheduler.pin(names)

    def unpin(self, block_ids: Sequence[int]) -> None:
        self._command(lambda: self.engine.scheduler.unpin(block_ids))

    def step_ages(self) -> tuple[float, float]:
        return 0.0, 0.0

    def pause(self) -> None:
        self._is_paused = True
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def go(self) -> None:
        self._is_paused = False
        self._schedule()

    def step_once(self) -> StepResult:
        """Commands first, as in the real thread."""
        commands, self._commands = self._commands, []
        for command in commands:
            command()
        result = self.engine.step()
        if not result.is_empty:
            self._on_step(result)
        return result

    def _command(self, command: Callable[[], object]) -> None:
        self._commands.append(command)
        self._schedule()

    def _schedule(self) -> None:
        if self._handle is None and not self._is_paused:
            self._handle = asyncio.get_running_loop().call_soon(self._step)

    def _step(self) -> None:
        self._handle = None
        try:
            result = self.step_once()
        except Exception as error:
            self.die(error)
            return
        if result.num_scheduled_tokens or self._commands:
            self._schedule()
