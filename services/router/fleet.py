"""All workers that this router knows, and what they hold."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from relevo.core.prefix_index import PrefixIndex
from services.common.discovery import Discovery
from services.common.security import NO_SECURITY, Security
from services.common.stuck import STUCK_SECONDS
from services.router.agents import Agents
from services.router.connection import SILENCE_SECONDS, Condition, WorkerConnection
from services.router.generation import ServedModel
from services.router.request_stream import DECODE, PREFILL, WorkerKind


class Fleet:
    """Connections to the workers that discovery names. run() owns every task."""

    def __init__(
        self,
        discovery: Discovery,
        *,
        security: Security = NO_SECURITY,
        silence_seconds: float = SILENCE_SECONDS,
        stuck_seconds: float = STUCK_SECONDS,
    ) -> None:
        """security: what the workers ask for, and what this router proves itself with.

        silence_seconds, stuck_seconds: after how long a worker that says nothing, or that is in one step, is given up
        """
        self.index = PrefixIndex()
        self.agents = Agents(self.index, security)
        self.news = asyncio.Event()  # set when a worker is connected; replaced by a new one at the same time
        self._discovery = discovery
        self._security = security
        self._silence_seconds = silence_seconds
        self._stuck_seconds = stuck_seconds
        self._workers: dict[str, dict[str, WorkerConnection]] = {PREFILL.name: {}, DECODE.name: {}}
        self._model: ServedModel | None = None  # None: to be found anew
        self._discovered = {PREFILL.name: asyncio.Event(), DECODE.name: asyncio.Event()}

    @property
    def trouble(self) -> str:
        """Why workers may be there that are not known; "" if discovery works."""
        return self._discovery.trouble

    @property
    def workers(self) -> list[WorkerConnection]:
        """Connected or not."""
        return [worker for of_kind in self._workers.values() for worker in list(of_kind.values())]

    def connected(self, kind: WorkerKind) -> list[WorkerConnection]:
        return [worker for worker in self._workers[kind.name].values() if worker.is_connected]

    def candidates(self, kind: WorkerKind) -> list[WorkerConnection]:
        """Those that requests may be placed on.

        Circuit breakers choose among workers: where all decode workers' are open, one of these is better than nobody.
        """
        now = asyncio.get_running_loop().time()
        conditions = [(worker, worker.condition(now)) for worker in self._workers[kind.name].values()]
        ready = [worker for worker, condition in conditions if condition == "ready"]
        if ready or kind is PREFILL:
            return ready
        return [worker for worker, condition in conditions if condition == "tripped"]

    def passed_over(self) -> Mapping[str, Condition]:
        """Addresses of workers that requests may not be placed on now, and why."""
        now = asyncio.get_running_loop().time()
        conditions = {worker.address: worker.condition(now) for worker in self.workers}
        return {address: condition for address, condition in conditions.items() if condition != "ready"}

    def worker(self, kind: WorkerKind, address: str) -> WorkerConnection:
        return self._workers[kind.name][address]

    def complaints(self, kind: WorkerKind) -> str:
        """Why workers of this kind cannot be used, as far as they have been tried; what is amiss with discovery."""
        now = asyncio.get_running_loop().time()
        complaints = []
        for worker in self._workers[kind.name].values():
            condition = worker.condition(now)
            if worker.complaint:
                complaints.append(worker.complaint)
            elif condition not in ("ready", "lost"):
                complaints.append(f"{kind.name} worker {worker.address} is {condition}")
        return "; ".join([*complaints, *([self.trouble] if self.trouble else [])])

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
            tasks.create_task(self._discovery.run(self._is_alive), name="discovery")
            for kind in (PREFILL, DECODE):
                tasks.create_task(self._follow(kind, tasks))

    async def _follow(self, kind: WorkerKind, tasks: asyncio.TaskGroup) -> None:
        workers = self._workers[kind.name]
        running: dict[str, asyncio.Task[None]] = {}
        leaving: dict[str, asyncio.Task[None]] = {}

        async def see_off(address: str) -> None:
            """It has left the list: its requests end there, and then the connection does."""
            await workers[address].wait_idle()
            running.pop(address).cancel()
            del workers[address], leaving[address]
            self._model = None

        async for members in self._discovery.watch(kind.name):
            for address in running.keys() - members.keys() - leaving.keys():
                workers[address].is_leaving = True
                leaving[address] = tasks.create_task(see_off(address), name=f"{kind.name} {address} leaves")
            for address in sorted(members):
                if address not in running:
                    workers[address] = self._make_connection(kind, address)
                    running[address] = tasks.create_task(workers[address].run(), name=f"{kind.name} {address}")
                elif address in leaving:
                    leaving.pop(address).cancel()
                    workers[address].is_leaving = False
                    self._tell()
                workers[address].discovered(members[address])
            self._discovered[kind.name].set()

    def _make_connection(self, kind: WorkerKind, address: str) -> WorkerConnection:
        return WorkerConnection(
            address,
            kind,
            self.index,
            self.agents,
            security=self._security,
            silence_seconds=self._silence_seconds,
            stuck_seconds=self._stuck_seconds,
            on_connected=self._tell,
        )

    def _is_alive(self, address: str) -> bool:
        found = (of_kind.get(address) for of_kind in self._workers.values())
        return any(worker.is_connected and not worker.load.report.draining for worker in found if worker is not None)

    def _tell(self) -> None:
        self._model = None
        self.news.set()
        self.news = asyncio.Event()
