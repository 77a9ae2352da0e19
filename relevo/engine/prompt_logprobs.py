"""Log-probabilities of a prompt's tokens: which rows of a step's batch are needed for them, and what they say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

from torch import Tensor

from relevo.core.request import Request
from relevo.core.schedule import ScheduledRequest
from relevo.engine.host_copies import Download, upload_ints
from relevo.engine.logprobs import TokenLogprobs, score_tokens
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
        start = entry.start
        first = request.num_prompt_logprobs
        end = min(start + entry.num_scheduled_tokens, request.num_prompt_tokens - 1)
        assert start <= first, "a row whose logits are wanted was not computed here"
        if first < end:
            self.indices += range(batch_start + first - start, batch_start + end - start)
            self.token_ids += request.token_ids[first + 1 : end + 1]
            self.spans.append((request, end - first))

    def enqueue(self, kernels: Kernels, logits: Tensor) -> Callable[[], dict[str, list[TokenLogprobs]]]:
        """What waits for the device and says what came of these rows, by request id. From then on they may come from a
        cache.

        logits: [len(indices), vocab] float32
        """
        if not self.spans:
            return dict
        counts = [count for request, num_rows in self.spans for count in [_count(request)] * num_rows]
        scored = score_tokens(kernels, logits, upload_ints(self.token_ids, logits.device), counts)
        download = Download(scored.tensors, logits.device)

        def read() -> dict[str, list[TokenLogprobs]]:
            rows = iter(scored.read(*download.wait()))
            by_request: dict[str, list[TokenLogprobs]] = {}
            for request, num_rows in self.spans:
                by_request[request.request_id] = list(islice(rows, num_rows))
                request.num_prompt_logprobs += num_rows
            return by_request

        return read


def _count(request: Request) -> int:
    count = request.sampling.prompt_logprobs
    assert count is not None
    return count
