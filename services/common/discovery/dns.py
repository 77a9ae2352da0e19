"""Names that have an address for each worker, such as a headless service's in Kubernetes."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence

from services.common.discovery import IsAlive, Members, unknown_incarnations
from services.common.discovery.board import Board
from services.common.grpc import format_address

logger = logging.getLogger(__name__)

RESOLVE_SECONDS = 5.0  # a resolver that takes longer has failed

Resolve = Callable[[str, int], Awaitable[Iterable[str]]]
"""All IP addresses (A and AAAA) of a host. Raises OSError."""


class DnsDiscovery:
    """All names are resolved again and again. One that can't be keeps the addresses that it had.

    trouble: which names could not be resolved the last time, and why; "" if all could
    """

    def __init__(
        self, names: Mapping[str, Sequence[str]], interval_seconds: float, resolve: Resolve | None = None
    ) -> None:
        """names: host:port by role. resolve: None = as the operating system does it."""
        self.trouble = ""
        self._interval_seconds = interval_seconds
        self._resolve = resolve or _resolve
        self._names = {role: list(of_role) for role, of_role in names.items()}
        self._found: dict[str, Iterable[str]] = {}  # by name, as it was resolved last
        self._troubles: dict[str, str] = {}  # by name
        self._board = Board()

    def watch(self, role: str) -> AsyncIterator[Members]:
        return self._board.watch(role)

    async def run(self, is_alive: IsAlive) -> None:
        """Until cancelled."""
        while True:
            names = {name for of_role in self._names.values() for name in of_role}
            await asyncio.gather(*map(self._look_up, names))
            self.trouble = "; ".join(self._troubles[name] for name in sorted(self._troubles))
            self._board.write(
                {
                    role: unknown_incarnations(address for name in of_role for address in self._found.get(name, ()))
                    for role, of_role in self._names.items()
                }
            )
            await asyncio.sleep(self._interval_seconds)

    async def _look_up(self, name: str) -> None:
        host, _, port = name.rpartition(":")
        try:
            async with asyncio.timeout(RESOLVE_SECONDS):
                found = await self._resolve(host.strip("[]"), int(port))
        except OSError as error:  # gaierror and TimeoutError are such
            known = len(list(self._found.get(name, ())))
            trouble = f"{name} cannot be resolved: {error.strerror or error or 'no answer'}"
            if name not in self._troubles:  # once, and not at every attempt
                logger.warning("%s; going on with the %d addresses that are known", trouble, known)
            self._troubles[name] = trouble
        else:
            self._found[name] = [format_address(address, int(port)) for address in sorted(found)]
            if self._troubles.pop(name, None):
                logger.info("%s is resolved again", name)


async def _resolve(host: str, port: int) -> Iterable[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return {str(address[0]) for _, _, _, _, address in found}
