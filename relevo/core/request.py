"""A request as the scheduler sees it: tokens known, tokens computed, and the blocks that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from relevo.core.block_hash import BlockHash, hash_blocks
from relevo.core.output_grammar import OutputGrammar
from relevo.core.sampling_params import SamplingParams

# Where a token will be that a step in flight samples: no token's id, so that whoever takes it for one fails.
PENDING_TOKEN = -1


class RequestStatus(Enum):
    WAITING = "waiting"  # has no blocks
    WAITING_FOR_KV = "waiting_for_kv"  # has its blocks; somebody else is filling them
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(Enum):
    STOP = "stop"  # EOS or a stop token, which is the last of the output
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(slots=True, eq=False)
class Request:
    """token_ids, drawn:

    [0, num_prompt_tokens)              the prompt
    [num_prompt_tokens, len(token_ids)) the output so far
    [0, num_computed_tokens)            KV is in block_ids; the rest is what steps still have to compute
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    max_tokens: int  # resolved: never None, never beyond the model's context
    stop_token_ids: frozenset[int]  # EOS unless ignored, and the sampling parameters' own
    root_hash: BlockHash
    block_size: int
    await_kv: bool = False  # reserve the prompt's blocks, then wait until resume()
    hold_blocks: bool = False  # keep blocks after the end, until release()
    grammar: OutputGrammar | None = None  # what the output must fit
    priority: int = 0  # the lowest goes first
    arrival: int = 0  # the scheduler's count, which settles who goes first among equals

    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt, found in the pool when the request was first admitted
    block_ids: list[int] = field(default_factory=list)
    num_named_blocks: int = 0  # leading blocks that the pool knows by name
    num_preemptions: int = 0
    is_parked: bool = False  # its next token is chosen together with others': nothing to compute before
    num_pending_tokens: int = 0  # the last of token_ids, which steps in flight sample
    num_prompt_logprobs: int = 0  # rows of the prompt whose logits were looked at, each for the token that follows it
    _block_hashes: list[BlockHash] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_ending(self) -> bool:
        """Its last token is being sampled: nothing of it is left to compute."""
        return self.num_pending_tokens > 0 and self.num_output_tokens >= self.max_tokens

    def drop_pending_tokens(self) -> None:
        """It has ended before them."""
        del self.token_ids[self.num_tokens - self.num_pending_tokens :]
        self.num_pending_tokens = 0

    def end_reason(self, token_id: int, num_output_tokens: int) -> FinishReason | None:
        """Why the request ends with this token as the last of so many; None: it goes on."""
        if token_id in self.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if num_output_tokens >= self.max_tokens else None

    def until_end(self, token_ids: Sequence[int]) -> list[int]:
        """As many of these next tokens as there are until one ends the request."""
        taken: list[int] = []
        for token_id in token_ids:
            taken.append(token_id)
            if self.end_reason(token_id, self.num_output_tokens + len(taken)) is not None:
                break
        return taken

    @property
    def num_missing_prompt_logprobs(self) -> int:
        """Rows of the prompt that must be computed here, for their logits: none of them may come from a cache."""
        if self.sampling.prompt_logprobs is None:
            return 0
        return self.num_prompt_tokens - 1 - self.num_prompt_logprobs

    def copy_tokens(self, other: Request, token_id: int) -> None:
        """Become what the other one is, with a token more; blocks are the scheduler's to give."""
        self.token_ids = [*other.token_ids, token_id]
        self._block_hashes = list(other._block_hashes)

    @property
    def known_block_hashes(self) -> Sequence[BlockHash]:
        """What block_hashes() was asked for so far."""
        return self._block_hashes

    def block_hashes(self, num_tokens: int) -> list[BlockHash]:
        """Names of the full blocks in token_ids[:num_tokens]; computed once, as tokens come."""
        num_blocks = num_tokens // self.block_size
        known = len(self._block_hashes)
        if known < num_blocks:
            parent = self._block_hashes[-1] if known else self.root_hash
            self._block_hashes += hash_blocks(
                parent, self.token_ids, self.block_size, known * self.block_size, num_blocks * self.block_size
            )
        return self._block_hashes[:num_blocks]
