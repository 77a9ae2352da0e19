"""Drafts by a smaller model (Leviathan et al. 2023), with a paged cache of its own under the target's block ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from relevo.core.block_hash import BlockHash
from relevo.core.request import Request
from relevo.core.schedule import ScheduledRequest
from relevo.engine.batch import Span, flat_batch
from relevo.engine.forward_pass import ForwardPass
from relevo.engine.sampler import SampledToken, Sampler
from relevo.engine.spec_decode.verification import sampling_rows


@dataclass(slots=True)
class _Progress:
    """num_computed: tokens whose draft KV is in the request's blocks, as long as num_preemptions is the request's."""

    num_computed: int
    num_preemptions: int


class DraftModelProposer:
    """Its KV of a token lies in the block, and the place in it, where the target's lies.

    So blocks are allocated, shared and freed once. But a block that the target finds under its name, or that came from
    another worker, need not hold draft KV: `_names` says which do. Draft KV is computed for a request from its first
    block without it, a chunk at a time, while the request already decodes.

    Drafts are drawn as the target draws: same parameters, same random numbers (docs/adr/0016).
    """

    def __init__(self, forward: ForwardPass, eos_token_ids: tuple[int, ...], *, vocab_size: int, max_rows: int) -> None:
        """vocab_size: the target's. max_rows: computed in one pass."""
        self.forward = forward
        self._eos_token_ids = eos_token_ids
        self._vocab_size = min(vocab_size, forward.model.vocab_size)
        self._max_rows = max_rows
        self._block_size = forward.kv_cache.layout.block_size
        self._sampler = Sampler(self._vocab_size, forward.device, forward.kernels)
        self._progress: dict[str, _Progress] = {}
        # Block id → the name of the tokens whose draft KV, all of it, is there. Of blocks in use and of free ones.
        self._names: dict[int, BlockHash] = {}

    def propose(self, entries: Sequence[ScheduledRequest]) -> list[list[int]]:
        proposed: list[list[int]] = [[] for _ in entries]
        drafting = self._catch_up(entries, proposed)
        depth = 1
        while drafting := [at for at in drafting if entries[at].num_draft_slots > depth == len(proposed[at])]:
            # The newest draft of each is computed, and brings the next.
            spans = [
                Span(entries[at].request.block_ids, entries[at].request.num_tokens + depth - 1, 1) for at in drafting
            ]
            self._draft(
                entries, drafting, proposed, [proposed[at][-1] for at in drafting], spans, [*range(len(drafting))]
            )
            depth += 1
        return proposed

    def lag(self, request: Request) -> int:
        return max(0, request.num_tokens - self._computed(request) - 2)  # one or two are every step's

    def verified(self, entry: ScheduledRequest, num_accepted: int) -> None:
        # The last draft was not computed.
        progress = self._progress[entry.request.request_id]
        progress.num_computed += min(num_accepted, len(entry.draft_token_ids) - 1)

    def ended(self, request: Request) -> None:
        pass

    def forget(self, request_id: str) -> None:
        self._progress.pop(request_id, None)

    def measure(self, entries: Sequence[ScheduledRequest]) -> None:
        """A pass over these requests' last tokens, for its duration; writes into their blocks."""
        proposed: list[list[int]] = [[] for _ in entries]
        token_ids = [entry.request.token_ids[-1] for entry in entries]
        spans = [Span(entry.request.block_ids, entry.request.num_tokens - 1, 1) for entry in entries]
        self._draft(entries, range(len(entries)), proposed, token_ids, spans, [*range(len(entries))])

    def _computed(self, request: Request) -> int:
        progress = self._progress.get(request.request_id)
        if progress is None or progress.num_preemptions != request.num_preemptions:
            num_blocks = 0
            for block_id, name in zip(request.block_ids, request.block_hashes(request.num_tokens), strict=False):
                if self._names.get(block_id) != name:
                    break
                num_blocks += 1
            num_computed = min(num_blocks * self._block_size, request.num_tokens - 1)
            progress = self._progress[request.request_id] = _Progress(num_computed, request.num_preemptions)
        return progress.num_computed

    def _catch_up(self, entries: Sequence[ScheduledRequest], proposed: list[list[int]]) -> list[int]:
        """Compute known tokens; those requests that have all of theirs get their first draft: returns which."""
        budget = self._max_rows
        chosen: list[int] = []
        token_ids: list[int] = []
        spans: list[Span] = []
        last_rows: list[int] = []
        lags = [(self._lag_of(entry), at) for at, entry in enumerate(entries) if entry.num_draft_slots]
        computed: list[tuple[Request, int]] = []
        for lag, at in sorted(lags):  # a long prompt must not keep the others from their drafts
            request = entries[at].request
            count = min(lag, budget)
            if count == 0 or request.num_tokens + entries[at].num_draft_slots > self.forward.model.max_model_len:
                continue
            start = request.num_tokens - lag
            token_ids += request.token_ids[start : start + count]
            spans.append(Span(request.block_ids, start, count))
            computed.append((request, start + count))
            budget -= count
            self._will_write(entries[at], start)
            if count == lag:
                chosen.append(at)
                last_rows.append(len(token_ids) - 1)
        if spans:
            self._draft(entries, chosen, proposed, token_ids, spans, last_rows)
        for request, num_computed in computed:
            self._progress[request.request_id].num_computed = num_computed
            self._name_blocks(request, num_computed)
        return chosen

    def _lag_of(self, entry: ScheduledRequest) -> int:
        return entry.request.num_tokens - self._computed(entry.request)

    def _draft(
        self,
        entries: Sequence[ScheduledRequest],
        drafting: Sequence[int],
        proposed: list[list[int]],
        token_ids: list[int],
        spans: Sequence[Span],
        sampled_rows: list[int],
    ) -> None:
        """One pass: computes the spans' tokens, and one draft more for each of entries[drafting], from sampled_rows."""
        known = np.minimum(np.array(token_ids, dtype=np.int64), self.forward.model.vocab_size - 1)
        logits = self.forward(flat_batch(known, spans, sampled_rows, self._block_size))
        if not drafting:
            return
        if logits.shape[1] > self._vocab_size:
            logits = logits[:, : self._vocab_size].contiguous()
        rows = [sampling_rows(entries[at].request, proposed[at], self._eos_token_ids)[-1] for at in drafting]
        for at, token in zip(drafting, self._sampler.sample(logits, rows), strict=True):
            if isinstance(token, SampledToken):
                proposed[at].append(token.token_id)

    def _will_write(self, entry: ScheduledRequest, start: int) -> None:
        """Known tokens from `start` on, and drafts behind them: what those blocks held is gone."""
        request = entry.request
        stop = request.num_tokens + entry.num_draft_slots - 1
        for block_id in request.block_ids[start // self._block_size : -(-stop // self._block_size)]:
            self._names.pop(block_id, None)

    def _name_blocks(self, request: Request, num_computed: int) -> None:
        names = request.block_hashes(num_computed)
        for index in range(len(names) - 1, -1, -1):
            block_id = request.block_ids[index]
            if self._names.get(block_id) == names[index]:
                break
            self._names[block_id] = names[index]
