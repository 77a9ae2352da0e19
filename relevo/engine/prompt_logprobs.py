"""Log-probabilities of a prompt's tokens: which rows of a step's batch are needed for them, and what they say."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from relevo.core.request import Request
from relevo.core.schedule import ScheduledRequest
from relevo.engine.logprobs import TokenLogprobs, token_logprobs
from relevo.kernels import Kernels

MAX_LOGITS = 1 << 25  # held at once for them: 128 MiB of float32


def max_rows(vocab_size: int) -> int:
    """In one step. At most 1,024: their logprobs go into one message."""
    return max(1, min(1024, MAX_LOGITS // vocab_size))


@dataclass(slots=True)
class PromptRows:
    """Rows of a flat batch, request after request, and the prompt's token that follows each.

    spans: request, how many rows are its
    """

    indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    spans: list[tuple[Request, int]] = field(default_factory=list)

    def add(self, entry: ScheduledRequest, batch_start: int) -> None:
        """batch_start: where the request's rows begin in the batch."""
        request = entry.request
        if not request.num_missing_prompt_logprobs:
            return
        start = request.num_computed_tokens
        first = request.num_prompt_logprobs
        end = min(start + entry.num_scheduled_tokens, request.num_prompt_tokens - 1)
        assert start <= first, "a row whose logits are wanted was not computed here"
        if first < end:
            self.indices += range(batch_start + first - start, batch_start + end - start)
            self.token_ids += request.token_ids[first + 1 : end + 1]
            self.spans.append((request, end - first))

    def score(self, kernels: Kernels, logits: Tensor) -> dict[str, list[TokenLogprobs]]:
        """By request id. logits: [len(indices), vocab] float32. From now on these rows may come from a cache."""
        counts = [count for request, num_rows in self.spans for count in [_count(request)] * num_rows]
        scored = token_logprobs(kernels, logits, self.token_ids, counts)
        by_request: dict[str, list[TokenLogprobs]] = {}
        at = 0
        for request, num_rows in self.spans:
            by_request[request.request_id] = scored[at : at + num_rows]
            request.num_prompt_logprobs += num_rows
            at += num_rows
        return by_request


def _count(request: Request) -> int:
    count = request.sampling.prompt_logprobs
    assert count is not None
    return count
