"""Who is there: addresses by role."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Protocol, TypeAlias

Members: TypeAlias = Mapping[str, str]
"""address (host:port) → incarnation of the process that listens there, "" where discovery does not know."""

IsAlive: TypeAlias = Callable[[str], bool]
"""Whether whoever listens at this address is known to be well, by its own word."""


class Discovery(Protocol):
    """trouble: why what it says may be out of date; "" if it is not"""

    trouble: str

    def watch(self, role: str) -> AsyncIterator[Members]:
        """The workers of a role now, then again whenever they change. Ends if they never will."""
        ...

    async def run(self, is_alive: IsAlive) -> None:
        """What has to be done for watch() meanwhile; returns if that is nothing."""


class StaticDiscovery:
    """The addresses of the command line."""

    trouble = ""

    def __init__(self, addresses: Mapping[str, Sequence[str]]) -> None:
        self._addresses = {role: unknown_incarnations(of_role) for role, of_role in addresses.items()}

    async def watch(self, role: str) -> AsyncIterator[Members]:
        yield self._addresses.get(role, {})

    async def run(self, is_alive: IsAlive) -> None:
        pass


def unknown_incarnations(addresses: Iterable[str]) -> Members:
    return dict.fromkeys(addresses, "")
