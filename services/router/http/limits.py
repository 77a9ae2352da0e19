"""What one API key may ask of the server: requests a second, and requests at the same time.

Limits of the keys file, counted in this process; limits_redis.py counts them for several routers together.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from relevo.core.errors import Exhausted
from services.router.http.keys import ApiKey

_GAIN = 0.2  # of the latest request in the mean duration
_FIRST_GUESS_SECONDS = 1.0


class Permit(Protocol):
    """A request's place among its key's."""

    async def release(self) -> None:
        """The request is over. Never raises what the request's client would see."""


class Limiter(Protocol):
    async def acquire(self, key: ApiKey) -> Permit:
        """Raises Exhausted, with the time after which it is worth trying again."""


@dataclass(slots=True)
class TokenBucket:
    """`burst` requests at once, `rate` a second in the long run. Times are seconds, on one clock."""

    rate: float
    burst: float
    level: float
    filled_at: float

    def take(self, now: float) -> float:
        """0 if the request may go on; else the seconds until one may, and nothing was taken."""
        self.level = min(self.burst, self.level + (now - self.filled_at) * self.rate)
        self.filled_at = now
        if self.level >= 1.0:
            self.level -= 1.0
            return 0.0
        return (1.0 - self.level) / self.rate


@dataclass(slots=True)
class _Usage:
    bucket: TokenBucket | None
    num_running: int = 0
    mean_seconds: float = _FIRST_GUESS_SECONDS


@dataclass(slots=True)
class _LocalPermit:
    usage: _Usage
    began: float
    clock: Callable[[], float]
    released: bool = field(default=False)

    async def release(self) -> None:
        if not self.released:
            self.released = True
            self.usage.num_running -= 1
            self.usage.mean_seconds += _GAIN * (self.clock() - self.began - self.usage.mean_seconds)


class LocalLimiter:
    """Bounded by the number of keys: usage is kept of those that have limits."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._usage: dict[str, _Usage] = {}

    async def acquire(self, key: ApiKey) -> Permit:
        now = self._clock()
        usage = self._usage.get(key.name)
        if usage is None:
            bucket = None if key.rps is None else TokenBucket(key.rps, key.burst, key.burst, now)
            usage = self._usage[key.name] = _Usage(bucket)
        if key.concurrency is not None and usage.num_running >= key.concurrency:
            raise too_many_at_once(key, usage.mean_seconds / key.concurrency)
        if usage.bucket is not None and (seconds := usage.bucket.take(now)) > 0:
            raise too_fast(key, seconds)
        usage.num_running += 1
        return _LocalPermit(usage, now, self._clock)


def too_fast(key: ApiKey, seconds: float) -> Exhausted:
    return Exhausted(f"the API key {key.name!r} may send {key.rps:g} requests a second", seconds)


def too_many_at_once(key: ApiKey, seconds: float) -> Exhausted:
    return Exhausted(f"the API key {key.name!r} may have {key.concurrency} requests at the same time", seconds)
