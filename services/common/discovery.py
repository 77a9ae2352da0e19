"""Who is there: addresses by role."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Protocol


class Discovery(Protocol):
    def watch(self, role: str) -> AsyncIterator[frozenset[str]]:
        """The addresses (host:port) of a role now, then again whenever they change. Ends if they never will."""
        ...


class StaticDiscovery:
    """The addresses of the command line."""

    def __init__(self, addresses: Mapping[str, Sequence[str]]) -> None:
        self._addresses = {role: frozenset(of_role) for role, of_role in addresses.items()}

    async def watch(self, role: str) -> AsyncIterator[frozenset[str]]:
        yield self._addresses.get(role, frozenset())
