"""How a block's bytes get from one agent's arena into another's. Control is gRPC; this is the data plane."""

from __future__ import annotations

from typing import Protocol


class PinnedSlots(Protocol):
    """What the serving end must ask before it shows a byte, and is told when a token's stream ends."""

    def has_pinned_slot(self, token: bytes, slot: int) -> bool: ...


class DataServer(Protocol):
    """The end whose arena holds the blocks."""

    @property
    def address(self) -> str: ...

    def end_stream(self, token: bytes) -> None:
        """The token is worth nothing any more: cut off what is being sent for it."""
        ...

    async def run(self) -> None:
        """Serve until cancelled."""
        ...


class DataConnection(Protocol):
    """The end that pulls, for one pull token. One user at a time; errors are Unavailable; close it always."""

    async def request(self, slots: list[int]) -> None:
        """Ask for these slots of the peer's arena; they come in this order."""
        ...

    async def receive(self, into: memoryview) -> bool:
        """The next slot's bytes; False if it was not pinned there (any more)."""
        ...

    def close(self) -> None: ...
