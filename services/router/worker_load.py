"""How busy a worker is: its own last report, and what was sent to it since."""

from __future__ import annotations

from services.pb import messages_pb2

SETTLE_SECONDS = 0.05  # from sending a request to its being counted in reports, beyond a step of the engine


class WorkerLoad:
    """A worker's last report plus the requests that no report can have counted yet.

    Reports lag: without the second part, all of 64 requests that arrive at once would go to the worker that was the
    least busy before the first of them. A request counts here until the first report that comes SETTLE_SECONDS and one
    step after it was sent; for that moment it may be counted twice, never not at all.
    """

    def __init__(self) -> None:
        self.report = messages_pb2.Load()
        self._unreported: dict[int, tuple[float, int]] = {}  # handle → sent at, tokens; in order of sending
        self._num_unreported_tokens = 0

    @property
    def num_requests(self) -> int:
        return self.report.num_running + self.report.num_waiting + len(self._unreported)

    @property
    def num_waiting_tokens(self) -> int:
        return self.report.num_waiting_tokens + self._num_unreported_tokens

    def sent(self, handle: int, num_tokens: int, now: float) -> None:
        """A request of which the worker will compute num_tokens of the prompt."""
        self._unreported[handle] = (now, num_tokens)
        self._num_unreported_tokens += num_tokens

    def ended(self, handle: int) -> None:
        """Harmless for requests that do not count any more."""
        _, num_tokens = self._unreported.pop(handle, (0.0, 0))
        self._num_unreported_tokens -= num_tokens

    def reported(self, report: messages_pb2.Load, now: float) -> None:
        self.report = report
        settled = now - SETTLE_SECONDS - report.step_seconds
        while self._unreported:
            handle, (sent_at, _) = next(iter(self._unreported.items()))
            if sent_at > settled:
                break
            self.ended(handle)

    def reset(self, num_blocks: int) -> None:
        """Another process is there now, or the same one has dropped what was sent. Until it reports: idle, all free."""
        self.report = messages_pb2.Load(num_free_blocks=num_blocks)
        self._unreported.clear()
        self._num_unreported_tokens = 0
