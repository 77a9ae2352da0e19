"""NIXL's Python interface within this process, as far as services/common/nixl.py uses it: what is read is there when
somebody looks whether it is, and not before.
"""

from __future__ import annotations

import ctypes
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

Ranges = list[tuple[int, int, int]]


class FakeNixl:
    """One for all agents.

    is_stuck: transfers do not end; those of agents that exist still may, see deliver()
    fails: transfers end with an error
    damage: told each address into which a block has been read
    """

    def __init__(self) -> None:
        self.agents: weakref.WeakValueDictionary[str, FakeNixlAgent] = weakref.WeakValueDictionary()
        self.is_stuck = self.fails = False
        self.damage: Callable[[int], object] = lambda _address: None
        self.num_transfers = 0

    def nixl_agent_config(self, **_options: Any) -> None:
        return None

    def nixl_agent(self, name: str, _config: None) -> FakeNixlAgent:
        assert name not in self.agents
        agent = self.agents[name] = FakeNixlAgent(self, name)
        return agent

    def deliver(self) -> None:
        """What is under way arrives."""
        for agent in list(self.agents.values()):
            agent.deliver()

    @property
    def num_under_way(self) -> int:
        return sum(len(agent.under_way) for agent in list(self.agents.values()))


class FakeNixlAgent:
    def __init__(self, nixl: FakeNixl, name: str) -> None:
        self.under_way: dict[int, tuple[Ranges, Ranges]] = {}
        self._nixl = nixl
        self._name = name
        self._regions: Ranges = []
        self._peer = ""
        self._numbers = count()

    def register_memory(self, regions: list[tuple[int, int, int, str]], kind: str) -> None:
        assert kind in ("DRAM", "VRAM")
        self._regions += [region[:3] for region in regions]

    def get_agent_metadata(self) -> bytes:
        return b"fake:" + self._name.encode()

    def add_remote_agent(self, metadata: bytes) -> bytes:
        kind, _, name = metadata.partition(b":")
        if kind != b"fake":
            raise RuntimeError("NIXL_ERR_MISMATCH")
        return name

    def get_xfer_descs(self, ranges: Ranges, _kind: str) -> Ranges:
        return ranges

    def initialize_xfer(self, operation: str, into: Ranges, source: Ranges, peer: str) -> FakeHandle:
        assert operation == "READ"
        self._check(into)
        if peer not in self._nixl.agents:
            raise RuntimeError("NIXL_ERR_REMOTE_DISCONNECT")
        self._nixl.agents[peer]._check(source)
        return FakeHandle(self, next(self._numbers), into, source)

    def transfer(self, handle: FakeHandle) -> str:
        self._nixl.num_transfers += 1
        self.under_way[handle.number] = handle.into, handle.source
        return "PROC"

    def check_xfer_state(self, handle: FakeHandle) -> str:
        if self._nixl.is_stuck:
            return "PROC"
        if self._nixl.fails:
            return "ERR"
        self.deliver()
        return "DONE"

    def release_xfer_handle(self, handle: FakeHandle) -> None:
        assert handle.number not in self.under_way

    def update_notifs(self) -> None:
        pass

    def deliver(self) -> None:
        while self.under_way:
            _, (into, source) = self.under_way.popitem()
            for (target, size, _), (origin, _, _) in zip(into, source, strict=True):
                ctypes.memmove(target, origin, size)
                self._nixl.damage(target)

    def _check(self, ranges: Ranges) -> None:
        for address, size, _ in ranges:
            if not any(start <= address and address + size <= start + length for start, length, _ in self._regions):
                raise RuntimeError("NIXL_ERR_NOT_FOUND")


class FakeHandle:
    """Keeps its agent alive, as NIXL's do."""

    def __init__(self, agent: FakeNixlAgent, number: int, into: Ranges, source: Ranges) -> None:
        self.agent, self.number, self.into, self.source = agent, number, into, source


@contextmanager
def fake_nixl() -> Iterator[FakeNixl]:
    """Inside, it is what is installed."""
    nixl = FakeNixl()
    module = types.ModuleType("nixl_cu13._api")
    module.__dict__.update(nixl_agent=nixl.nixl_agent, nixl_agent_config=nixl.nixl_agent_config)
    stand_ins = {"nixl_cu13": types.ModuleType("nixl_cu13"), "nixl_cu13._api": module}
    before = {name: sys.modules.pop(name, None) for name in stand_ins}
    sys.modules.update(stand_ins)
    try:
        yield nixl
    finally:
        for name, module_before in before.items():
            del sys.modules[name]
            if module_before is not None:
                sys.modules[name] = module_before
