"""How busy a worker is, and what it will hold: its own last report, and what was sent to it since."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from relevo.core.block_hash import BlockHash

SETTLE_SECONDS = 0.05  # from sending a request to its being counted in reports, beyond a step of the engine
_MAX_PROGRESS = 0.95  # a prompt is not done before its first token says so


class Report(Protocol):
    """What a worker says of itself; see `Load` in protos/services/pb/messages.proto. 0 = not measured."""

    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def num_waiting_tokens(self) -> int: ...
    @property
    def prefill_tokens_per_second(self) -> float: ...
    @property
    def step_seconds(self) -> float: ...


@dataclass(frozen=True, slots=True)
class PromptWork:
    """A prompt on its way to a worker. num_uncached_tokens: those that it will compute, by what was known then;
    hashes: names of the prompt's full blocks, all of which it will hold afterwards."""

    num_prompt_tokens: int
    num_uncached_tokens: int
    hashes: Sequence[BlockHash] = ()


ReportT = TypeVar("ReportT", bound=Report)


class WorkerLoad(Generic[ReportT]):
    """A worker's last report, and what is known better here: the prompts that were sent and have no first token yet.

    report: until there is one, what is assumed of the worker. A worker that comes back is a new WorkerLoad.

    Reports lag: without what was sent, all of 64 requests that arrive at once would go to the worker that was the least
    busy before the first of them. And a worker learns only when it starts on a prompt how much of it is cached, so that
    its report counts a queue of twenty turns of one chat twenty times. So

    - requests: the report's, and ours until the first report that comes SETTLE_SECONDS and one step after they were
      sent; for that moment one may be counted twice, never not at all;
    - waiting tokens: ours as they were predicted, less what the first of them has had done to it by now (workers take
      prompts in order), and of the report's what cannot be ours, because it is more than all of our prompts;
    - blocks: those of our unfinished prompts are expected. Who comes behind them in the queue will find them.

    Times are seconds, of any one clock.
    """

    def __init__(self, report: ReportT) -> None:
        self.report = report
        self._unreported: dict[Hashable, float] = {}  # handle → sent at; in order of sending
        self._prompts: dict[Hashable, PromptWork] = {}  # handle → without a first token yet; in order of sending
        self._num_own_tokens = 0  # predicted, of all in _prompts
        self._num_own_prompt_tokens = 0
        self._num_others_tokens = 0  # in the last report, beyond what is ours
        self._first_since = 0.0  # when the worker began with the first of _prompts
        self._expected: dict[BlockHash, int] = {}  # how many of _prompts have the block

    @property
    def num_requests(self) -> int:
        return self.report.num_running + self.report.num_waiting + len(self._unreported)

    def num_waiting_tokens(self, now: float) -> float:
        """To be computed before a prompt that comes now."""
        tokens = self._num_others_tokens + self._num_own_tokens
        for work in self._prompts.values():
            if work.num_uncached_tokens:
                done = (now - self._first_since) * self.report.prefill_tokens_per_second
                return tokens - min(max(0.0, done), _MAX_PROGRESS * work.num_uncached_tokens)
        return tokens

    def num_expected_blocks(self, hashes: Sequence[BlockHash]) -> int:
        """How many leading blocks of a prompt, named `hashes`, the unfinished prompts will leave there."""
        # A prompt brings all of its names, and names are chained: whoever has one has all before it.
        expected = self._expected
        if not hashes or hashes[0] not in expected:
            return 0
        return bisect_left(hashes, True, key=lambda name: name not in expected)

    def sent(self, handle: Hashable, work: PromptWork, now: float) -> None:
        """handle: what names the request here, and in the calls that follow."""
        self._unreported[handle] = now
        if not any(other.num_uncached_tokens for other in self._prompts.values()):
            self._first_since = now
        self._prompts[handle] = work
        self._num_own_tokens += work.num_uncached_tokens
        self._num_own_prompt_tokens += work.num_prompt_tokens
        expected = self._expected
        for name in work.hashes:
            expected[name] = expected.get(name, 0) + 1

    def computed(self, handle: Hashable, now: float) -> None:
        """The request has its first token. Harmless for those that had it before, and for unknown ones."""
        work = self._prompts.pop(handle, None)
        if work is None:
            return
        self._num_own_tokens -= work.num_uncached_tokens
        self._num_own_prompt_tokens -= work.num_prompt_tokens
        if work.num_uncached_tokens:
            self._first_since = now
        expected = self._expected
        for name in work.hashes:
            if expected[name] == 1:
                del expected[name]
            else:
                expected[name] -= 1

    def ended(self, handle: Hashable, now: float) -> None:
        """Harmless for requests that do not count any more."""
        self._unreported.pop(handle, None)
        self.computed(handle, now)

    def reported(self, report: ReportT, now: float) -> None:
        self.report = report
        self._num_others_tokens = max(0, report.num_waiting_tokens - self._num_own_prompt_tokens)
        settled = now - SETTLE_SECONDS - report.step_seconds
        while self._unreported:
            handle, sent_at = next(iter(self._unreported.items()))
            if sent_at > settled:
                break
            del self._unreported[handle]
