"""The engine as workers see it: relevo.engine's Engine and EngineThread, or the tests' fake."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from relevo.core.block_hash import BlockHash
from relevo.core.errors import RelevoError
from relevo.core.request import Request
from relevo.core.sampling_params import SamplingParams
from relevo.engine.beams import EndedBeams
from relevo.engine.cache_memory import CacheMemory
from relevo.engine.config import EngineInfo
from relevo.engine.kv_cache import HostBlocks
from relevo.engine.step_result import Chunk, Computed, EndedRequest, NewTokens, PromptLogprobs, Reserved, StepResult


class KVCachePort(Protocol):
    """Blocks' bytes; any thread, for blocks that are held."""

    @property
    def memory(self) -> CacheMemory: ...

    def send(self, block_ids: Sequence[int], slots: Sequence[memoryview]) -> list[int] | None: ...
    def last_launch(self) -> object: ...
    def receive(self, block_ids: Sequence[int], slots: Sequence[memoryview], after: object) -> list[int] | None: ...
    def leaving(self, block_ids: Sequence[int]) -> HostBlocks: ...
    def arriving(self, block_ids: Sequence[int], after: object) -> HostBlocks: ...


class EnginePort(Protocol):
    @property
    def info(self) -> EngineInfo: ...
    @property
    def kv_cache(self) -> KVCachePort: ...
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
    ) -> Request: ...


class EngineThreadPort(Protocol):
    """Commands take effect before the next step; results come in on_step, in the loop that called start()."""

    def start(self) -> None: ...
    async def stop(self) -> None: ...
    async def wait(self) -> None: ...
    def submit(self, request: Request) -> None: ...
    def resume(self, request_id: str, num_computed_tokens: int, token_ids: list[int]) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def release(self, request_id: str) -> None: ...
    async def pin(self, names: Sequence[BlockHash]) -> dict[BlockHash, int]: ...
    def unpin(self, block_ids: Sequence[int]) -> None: ...
    def step_ages(self) -> tuple[float, float]: ...


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request has its first blocks."""

    request_id: str


Event = Admitted | Reserved | Chunk | Computed | PromptLogprobs | NewTokens | EndedBeams | EndedRequest


class Listener(Protocol):
    """A request that hears what steps bring it."""

    def on_event(self, event: Event) -> None: ...
    def cancel(self, error: RelevoError | None = None) -> None: ...


MakeEngineThread = Callable[[Any, Callable[[StepResult], None]], EngineThreadPort]
