"""What a worker did for one request, and when: told to its router, which makes spans of it (docs/adr/0020)."""

from __future__ import annotations

import time

from services.pb import messages_pb2 as pb

MAX_OF_A_NAME = 32  # a request's stages of one name; from then on the last of them grows


class Stages:
    """Times are on the clock of time.monotonic, and told as milliseconds since this was made."""

    def __init__(self) -> None:
        self.received_at = time.monotonic()
        self._counts: dict[str, int] = {}
        self._untold: list[pb.Stage] = []
        self._last: dict[str, pb.Stage] = {}

    def add(self, name: str, began_at: float, ended_at: float, **numbers: float) -> pb.Stage:
        """numbers: what is to be said of it. Of a name that there is too often already, the last one goes on."""
        count = self._counts.get(name, 0)
        last = self._last.get(name)
        if last is not None and count >= MAX_OF_A_NAME:
            last.duration_ms = 1e3 * (ended_at - self.received_at) - last.start_ms
            for key, value in numbers.items():
                last.numbers[key] += value
            return last
        self._counts[name] = count + 1
        stage = pb.Stage(
            name=name,
            start_ms=1e3 * (began_at - self.received_at),
            duration_ms=1e3 * max(0.0, ended_at - began_at),
            numbers=numbers,
        )
        self._untold.append(stage)
        if count == MAX_OF_A_NAME - 1:
            self._last[name] = stage
        return stage

    def take(self) -> pb.Stages:
        """Those that were not told yet."""
        untold, self._untold = self._untold, []
        return pb.Stages(stages=untold, sent_ms=1e3 * (time.monotonic() - self.received_at))
