"""What one step brought: plain data, the engine's only way to speak."""

from __future__ import annotations

from dataclasses import dataclass, field

from relevo.core.block_hash import BlockHash
from relevo.core.errors import RelevoError
from relevo.core.request import FinishReason
from relevo.engine.beams import EndedBeams
from relevo.engine.logprobs import TokenLogprobs
from relevo.engine.spec_decode.stats import SpecDecodeStats


@dataclass(frozen=True, slots=True)
class Reserved:
    """An await_kv request has its blocks. block_ids: of its full blocks; the first are filled already."""

    request_id: str
    block_ids: list[int]
    num_cached_tokens: int  # a multiple of block_size


@dataclass(frozen=True, slots=True)
class Computed:
    """A hold_blocks request has KV for [0, num_computed_tokens)."""

    request_id: str
    num_computed_tokens: int
    block_ids: list[int]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A step has computed this much of what a request knew: of its prompt, or of what it has to compute again."""

    request_id: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class NewTokens:
    request_id: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]  # empty, or one a token


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Of the next tokens of the prompt; the first token of all has none."""

    request_id: str
    logprobs: list[TokenLogprobs]


@dataclass(frozen=True, slots=True)
class EndedRequest:
    """error: why it ended before its end, by a fault of its own; finish_reason is CANCELLED then."""

    request_id: str
    finish_reason: FinishReason
    num_cached_tokens: int
    error: RelevoError | None = None
    num_draft_tokens: int = 0  # proposed for it
    num_accepted_tokens: int = 0  # of those


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """Rates are exponentially weighted means over recent steps; 0 until measured."""

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0  # known and not computed, of all requests
    num_free_blocks: int = 0
    prefill_tokens_per_second: float = 0.0
    step_seconds: float = 0.0  # of steps without prompts, for each token that a request got: drafts shorten it
    step_seconds_per_request: float = 0.0  # what one more request in the batch adds to such a step
    speculation: SpecDecodeStats | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """stored and removed are block names, disjoint: the net change of what the pool holds.

    began_at, ended_at: on the clock of time.monotonic
    """

    load: EngineLoad
    reserved: list[Reserved] = field(default_factory=list)
    admitted: list[str] = field(default_factory=list)
    computed: list[Computed] = field(default_factory=list)
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    tokens: list[NewTokens] = field(default_factory=list)
    beams: list[EndedBeams] = field(default_factory=list)
    ended: list[EndedRequest] = field(default_factory=list)
    stored: list[BlockHash] = field(default_factory=list)
    removed: list[BlockHash] = field(default_factory=list)
    num_scheduled_tokens: int = 0
    chunks: list[Chunk] = field(default_factory=list)
    began_at: float = 0.0
    ended_at: float = 0.0

    @property
    def is_empty(self) -> bool:
        """Nobody needs to hear of it."""
        told = self.num_scheduled_tokens or self.reserved or self.admitted or self.ended or self.stored or self.removed
        return not told
