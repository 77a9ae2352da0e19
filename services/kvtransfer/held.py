"""The names that a Fetch would find at this agent, wherever they lie, for those who watch."""

from __future__ import annotations

import asyncio

from relevo.core.block_hash import BlockHash
from services.common.block_events import BlockEvents
from services.pb import messages_pb2

_COLLECT_SECONDS = 0.02  # changes of this long go into one event


class HeldNames:
    """Counts the places of each name: stored is what has got its first, removed what has lost its last."""

    def __init__(self) -> None:
        self.events = BlockEvents(messages_pb2.Load)
        self._num_places: dict[BlockHash, int] = {}
        self._changed: dict[BlockHash, bool] = {}  # → was it held before; bounded by what _COLLECT_SECONDS bring
        self._wake = asyncio.Event()

    def __contains__(self, name: BlockHash) -> bool:
        return name in self._num_places

    def add(self, name: BlockHash) -> None:
        self._note(name)
        self._num_places[name] = self._num_places.get(name, 0) + 1

    def discard(self, name: BlockHash) -> None:
        self._note(name)
        if self._num_places[name] == 1:
            del self._num_places[name]
        else:
            self._num_places[name] -= 1

    async def run(self) -> None:
        """Tell watchers, until cancelled."""
        while True:
            await self._wake.wait()
            await asyncio.sleep(_COLLECT_SECONDS)
            self._wake.clear()
            changed, self._changed = self._changed, {}
            removed = [name for name, was_held in changed.items() if was_held and name not in self._num_places]
            stored = [name for name, was_held in changed.items() if not was_held and name in self._num_places]
            self.events.apply(removed, stored)

    def _note(self, name: BlockHash) -> None:
        self._changed.setdefault(name, name in self._num_places)
        self._wake.set()
