"""NIXL (extra relevo[nixl]): reads of another process's memory, without asking it.

Imported when it is used: it needs a second, and libraries that not every machine has. Not through the package `nixl`,
which imports torch in order to find out about CUDA.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

_PACKAGES = ("nixl_cu13", "nixl_cu12")
_SPIN_SECONDS = 0.0003  # a transfer is waited for by looking, then by sleeping in between
_PAUSE_SECONDS = 0.00005


class NotInstalled(Exception):
    """Says what is missing."""


@dataclass(frozen=True)
class Memory:
    """kind: DRAM or VRAM. device: a GPU's index, as its process counts them."""

    kind: str = "DRAM"
    device: int = 0


HOST = Memory()


def load_nixl() -> Any:
    """NIXL's Python interface. Raises NotInstalled."""
    problems = []
    for package in _PACKAGES:
        try:
            module = importlib.import_module(f"{package}._api")
        except ImportError as error:
            problems.append(str(error))
            continue
        theirs = logging.getLogger("nixl")  # which it has configured to print on standard output
        theirs.handlers.clear()
        theirs.propagate = True
        theirs.setLevel(logging.WARNING)
        return module
    raise NotInstalled("; ".join(problems))


def is_nixl_loaded() -> bool:
    return any(name.startswith("nixl_cu") for name in sys.modules)


def leave(code: int) -> NoReturn:
    """Ends the process, which has stopped everything: sys.exit(), unless NIXL was loaded.

    Its wheels (1.5.1) bring a copy of libnl-route, and load the system's beside it where there is one; at exit() the
    copy's destructors take out of lists what went into the other's, and crash: exit code 139 after a clean shutdown.
    """
    if not is_nixl_loaded():
        sys.exit(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def make_agent(name: str, regions: Sequence[tuple[int, int]], memory: Memory = HOST) -> Any:
    """With these (address, bytes) registered. NIXL's exceptions are its own classes of C++: callers catch Exception."""
    nixl = load_nixl()
    config = nixl.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])  # its thread never sleeps
    agent = nixl.nixl_agent(name, config)
    agent.register_memory([(address, num_bytes, memory.device, "") for address, num_bytes in regions], memory.kind)
    return agent


class NixlReader:
    """Reads what one peer shows, into regions of ours, by an agent of its own. For one thread.

    metadata: of the peer's agent. ours, theirs: where the regions and what is read are.
    """

    def __init__(
        self,
        name: str,
        regions: Sequence[tuple[int, int]],
        metadata: bytes,
        ours: Memory = HOST,
        theirs: Memory = HOST,
    ) -> None:
        self._agent = make_agent(name, regions, ours)
        self._ours, self._theirs = ours, theirs
        peer = self._agent.add_remote_agent(metadata)
        self._peer = peer.decode() if isinstance(peer, bytes) else peer

    def read(self, ranges: Sequence[tuple[int, int, int]], seconds: float, is_cut: Callable[[], bool]) -> None:
        """(ours, theirs, bytes) each, within so many seconds.

        Raises ConnectionError; then the reader must be destroyed: until that is done, bytes may still arrive.
        """
        if problem := self._try_to_read(ranges, seconds, is_cut):
            raise ConnectionError(problem)

    def destroy(self) -> None:
        """Ends transfers, also those whose peer has gone: the one sure way. Twice is harmless."""
        self._agent = None
        gc.collect()

    def _try_to_read(
        self, ranges: Sequence[tuple[int, int, int]], seconds: float, is_cut: Callable[[], bool]
    ) -> str | None:
        """What went wrong, and nothing that would keep the agent alive: an exception's frames, a transfer's handle."""
        agent, ours, theirs = self._agent, self._ours, self._theirs
        try:
            into = agent.get_xfer_descs([(address, size, ours.device) for address, _, size in ranges], ours.kind)
            source = agent.get_xfer_descs([(address, size, theirs.device) for _, address, size in ranges], theirs.kind)
            handle = agent.initialize_xfer("READ", into, source, self._peer)
            state, start = agent.transfer(handle), time.monotonic()
            while state == "PROC":
                waited = time.monotonic() - start
                if is_cut():
                    return "cut off"
                if waited > seconds:
                    return f"nothing came for {seconds:g} s"
                if waited > _SPIN_SECONDS:
                    time.sleep(_PAUSE_SECONDS)
                state = agent.check_xfer_state(handle)
            if state != "DONE":
                return f"the transfer ended with {state}"
            agent.release_xfer_handle(handle)
        except Exception as error:  # NIXL's own classes
            return f"{type(error).__name__}: {error}"
        return None
