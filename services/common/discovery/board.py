"""What discoveries that change write on, and watchers read off."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

from services.common.discovery import Members


class Board:
    """The newest members of each role. A watcher that is slow misses what was in between, and nothing else."""

    def __init__(self) -> None:
        self._members: dict[str, Members] | None = None  # None: nothing is known yet
        self._changed = asyncio.Event()

    @property
    def num_members(self) -> int:
        return sum(len(members) for members in (self._members or {}).values())

    def write(self, members: Mapping[str, Members]) -> None:
        """Of all roles. The first time counts as a change, whatever it says."""
        if self._members != members:
            self._members = dict(members)
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()

    async def watch(self, role: str) -> AsyncIterator[Members]:
        """Never ends."""
        last: Members | None = None
        while True:
            changed = self._changed
            members = None if self._members is None else self._members.get(role, {})
            if members is not None and members != last:
                last = members
                yield members
            else:
                await changed.wait()
