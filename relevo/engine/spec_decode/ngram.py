"""Prompt lookup: what followed the last tokens where they stood before (Saxena 2023, "Prompt lookup decoding")."""

from __future__ import annotations

from collections.abc import Sequence

from relevo.core.request import Request
from relevo.core.schedule import ScheduledRequest

LENGTHS = (5, 2)  # of the tokens looked for, the longer first; two alone often stand there by chance
SHORT_MATCH_DRAFTS = 3  # behind a match of the shorter length
TOKENS_A_STEP = 4096  # that all requests together put into their indexes: some milliseconds


class NgramProposer:
    """One index a request, of its own tokens alone."""

    def __init__(self) -> None:
        self._indexes: dict[str, NgramIndex] = {}

    def propose(self, entries: Sequence[ScheduledRequest]) -> list[list[int]]:
        budget = TOKENS_A_STEP
        proposed: list[list[int]] = []
        for entry in entries:
            if not entry.num_draft_slots:
                proposed.append([])
                continue
            index = self._indexes.get(entry.request.request_id)
            if index is None:
                index = self._indexes[entry.request.request_id] = NgramIndex()
            token_ids = entry.request.token_ids
            budget -= index.extend(token_ids, budget)
            proposed.append(index.continuation(token_ids, entry.num_draft_slots))
        return proposed

    def lag(self, request: Request) -> int:
        return 0

    def verified(self, entry: ScheduledRequest, num_accepted: int) -> None:
        pass

    def ended(self, request: Request) -> None:
        pass

    def forget(self, request_id: str) -> None:
        self._indexes.pop(request_id, None)


class NgramIndex:
    """Where each run of tokens ended last, with at least one token behind it."""

    def __init__(self) -> None:
        self._ends: dict[int, dict[tuple[int, ...], int]] = {length: {} for length in LENGTHS}
        self._num_indexed = 0  # runs that end at a place up to here are in

    def extend(self, token_ids: Sequence[int], budget: int) -> int:
        """Take in tokens behind those that are in, at most `budget`; returns how many."""
        start, stop = self._num_indexed, min(len(token_ids) - 1, self._num_indexed + budget)
        if stop <= start:
            return 0
        for length, ends in self._ends.items():
            for end in range(max(start + 1, length), stop + 1):
                ends[tuple(token_ids[end - length : end])] = end
        self._num_indexed = stop
        return stop - start

    def continuation(self, token_ids: Sequence[int], num_tokens: int) -> list[int]:
        """What stood behind the last tokens before, at most so much; none until all tokens are in."""
        size = len(token_ids)
        if self._num_indexed < size - 1:
            return []
        for length, ends in self._ends.items():
            at = ends.get(tuple(token_ids[-length:])) if size >= length else None
            if at is not None:
                if length < LENGTHS[0]:
                    num_tokens = min(num_tokens, SHORT_MATCH_DRAFTS)
                return follow(token_ids, at, num_tokens)
        return []


def follow(token_ids: Sequence[int], at: int, num_tokens: int) -> list[int]:
    """So many tokens from `at` on. Behind the last one the text is taken to go on as it did: a loop goes round."""
    period = len(token_ids) - at
    return [token_ids[at + offset % period] for offset in range(num_tokens)]
