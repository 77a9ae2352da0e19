"""All workers that this router knows, and what they hold."""

from __future__ import annotations

import asyncio

from relevo.core.prefix_index import PrefixIndex
from services.common.discovery import Discovery
from services.common.security import NO_SECURITY, Security
from services.router.agents import Agents
from services.router.connection import SILENCE_SECONDS, WorkerConnection
from services.router.generation import ServedModel
from services.router.request_stream import DECODE, PREFILL, WorkerKind


class Fleet:
    """Connections to the workers that discovery names. run() owns every task."""

    def __init__(
        self, discovery: Discovery, *, security: Security = NO_SECURITY, silence_seconds: float = SILENCE_SECONDS
    ) -> None:
        """security: what the workers ask for, and what this router proves itself with."""
        self.index = PrefixIndex()
        self.agents = Agents(self.index, security)
        self.news = asyncio.Event()  # set when a worker is connected; replaced by a new one at the same time
        self._discovery = discovery
        self._security = security
        self._silence_seconds = silence_seconds
        self._workers: dict[str, dict[str, WorkerConnection]] = {PREFILL.name: {}, DECODE.name: {}}
        self._model: ServedModel | None = None  # None: to be found anew
        self._discovered = {PREFILL.name: asyncio.Event(), DECODE.name: asyncio.Event()}

    @property
    def workers(self) -> list[WorkerConnection]:
        """Connected or not."""
        return [worker for of_kind in self._workers.values() for worker in of_kind.values()]

    def connected(self, kind: WorkerKind) -> list[WorkerConnection]:
        return [worker for worker in self._workers[kind.name].values() if worker.is_connected]

    def worker(self, kind: WorkerKind, address: str) -> WorkerConnection:
        return self._workers[kind.name][address]

    def complaints(self, kind: WorkerKind) -> str:
        """Why workers of this kind are not connected, as far as they have been tried."""
        return "; ".join(worker.complaint for worker in self._workers[kind.name].values() if worker.complaint)

    def model(self) -> ServedModel | None:
        """The smallest limits of all workers that were ever connected."""
        if self._model is None:
            self._model = self._find_model()
        return self._model

    def _find_model(self) -> ServedModel | None:
        infos = [worker.info for worker in self.workers if worker.info is not None]
        if not infos:
            return None
        return ServedModel(
            max_model_len=min(info.max_model_len for info in infos),
            vocab_size=min(info.vocab_size for info in infos),
            block_size=min(info.block_size for info in infos),
        )

    async def wait_connected(self) -> None:
        """Until every worker that discovery names was reached."""
        for discovered in self._discovered.values():
            await discovered.wait()
        for worker in self.workers:
            await worker.wait_connected()

    async def run(self) -> None:
        """Follows discovery and keeps the connections, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            self.agents.start(tasks)
            for kind in (PREFILL, DECODE):
                tasks.create_task(self._follow(kind, tasks))

    async def _follow(self, kind: WorkerKind, tasks: asyncio.TaskGroup) -> None:
        workers = self._workers[kind.name]
        running: dict[str, asyncio.Task[None]] = {}
        async for addresses in self._discovery.watch(kind.name):
            for address in running.keys() - addresses:
                running.pop(address).cancel()
                del workers[address]
                self._model = None
            for address in sorted(addresses - running.keys()):
                workers[address] = WorkerConnection(
                    address,
                    kind,
                    self.index,
                    self.agents,
                    security=self._security,
                    silence_seconds=self._silence_seconds,
                    on_connected=self._tell,
                )
                running[address] = tasks.create_task(workers[address].run(), name=f"{kind.name} {address}")
            self._discovered[kind.name].set()

    def _tell(self) -> None:
        self._model = None
        self.news.set()
        self.news = asyncio.Event()
