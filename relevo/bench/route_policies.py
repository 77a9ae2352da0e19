"""Ways to choose a worker, for `relevo bench route`: what others publish, to compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Protocol

from relevo.bench.route_trace import BLOCK_TOKENS, TraceRequest
from relevo.core.block_hash import BlockHash


class Busy(Protocol):
    """num_requests: in flight, from the router's choice to the answer's last token, as routers count them."""

    num_requests: int


class Policy(Protocol):
    """Chooses among the workers of one pool; one object a pool, for it may remember."""

    def pick(self, request: TraceRequest, workers: Sequence[Busy]) -> int:
        """The worker's place in the list, which is the same every time."""


class RandomChoice:
    def __init__(self, seed: int) -> None:
        self._random = Random(seed)

    def pick(self, request: TraceRequest, workers: Sequence[Busy]) -> int:
        return self._random.randrange(len(workers))


class RoundRobin:
    def __init__(self) -> None:
        self._next = 0

    def pick(self, request: TraceRequest, workers: Sequence[Busy]) -> int:
        chosen = self._next % len(workers)
        self._next += 1
        return chosen


class LeastLoaded:
    """The fewest requests in flight; of equals the first."""

    def pick(self, request: TraceRequest, workers: Sequence[Busy]) -> int:
        return _least([worker.num_requests for worker in workers])


class CacheThreshold:
    """SGLang's cache-aware rule, with its published thresholds.

    The least busy if max − min > 32 and max > 1.1 · min requests; else the longest match in what was sent to each, if
    it is more than half of the prompt; else, by the documentation, the worker with the smallest tree, and, in the code
    as released (sglang-router 0.3), the least busy. The latter is what gives the times that the real router gives.
    """

    ABSOLUTE_THRESHOLD = 32
    RELATIVE_THRESHOLD = 1.1
    MATCH_THRESHOLD = 0.5

    def __init__(self, num_workers: int, *, unmatched_to_smallest_tree: bool = False) -> None:
        self._trees: list[set[BlockHash]] = [set() for _ in range(num_workers)]
        self._unmatched_to_smallest_tree = unmatched_to_smallest_tree

    def pick(self, request: TraceRequest, workers: Sequence[Busy]) -> int:
        chosen = self._choose(request, [worker.num_requests for worker in workers])
        self._trees[chosen].update(request.hashes)
        return chosen

    def _choose(self, request: TraceRequest, loads: Sequence[int]) -> int:
        most, fewest = max(loads), min(loads)
        if most - fewest > self.ABSOLUTE_THRESHOLD and most > self.RELATIVE_THRESHOLD * fewest:
            return _least(loads)
        matches = [_match(request.hashes, tree) for tree in self._trees]
        longest = max(matches)
        if longest * BLOCK_TOKENS > self.MATCH_THRESHOLD * request.num_prompt_tokens:
            return matches.index(longest)
        return _least([len(tree) for tree in self._trees] if self._unmatched_to_smallest_tree else loads)


def make_policy(name: str, num_workers: int, seed: int) -> Policy:
    """Of one of POLICIES."""
    return _MAKERS[name](num_workers, seed)


_MAKERS: dict[str, Callable[[int, int], Policy]] = {
    "random": lambda num_workers, seed: RandomChoice(seed),
    "round-robin": lambda num_workers, seed: RoundRobin(),
    "least-loaded": lambda num_workers, seed: LeastLoaded(),
    "cache-threshold": lambda num_workers, seed: CacheThreshold(num_workers),
    "cache-threshold-smallest-tree": lambda num_workers, seed: CacheThreshold(
        num_workers, unmatched_to_smallest_tree=True
    ),
}

POLICIES = tuple(_MAKERS)
"""Those that know no cost; `relevo` and `oracle` are placed by relevo.core.placement."""


def _match(hashes: Sequence[BlockHash], tree: set[BlockHash]) -> int:
    for index, name in enumerate(hashes):
        if name not in tree:
            return index
    return len(hashes)


def _least(values: Sequence[int]) -> int:
    return min(range(len(values)), key=values.__getitem__)
