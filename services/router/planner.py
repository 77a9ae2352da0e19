"""What placing a request takes: the fleet, what it holds of the prompt, and the cost model."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from relevo.core.placement import CostModel, Placement, WorkerView, place
from services.router.agents import AgentBlocks
from services.router.connection import WorkerConnection
from services.router.fleet import Fleet
from services.router.prompt import Prompt
from services.router.request_stream import DECODE, PREFILL
from services.router.route_log import Predictions, RouteLog


@dataclass(frozen=True, slots=True)
class Planner:
    """What placing takes, and what is learned from it."""

    fleet: Fleet
    costs: CostModel
    log: RouteLog
    predictions: Predictions

    async def place(
        self, prompt: Prompt, num_tokens: int, without: Collection[str], now: float, *, whole: bool = False
    ) -> Placement | None:
        """without: incarnations of decode workers that have refused. now: on the event loop's clock.

        whole: decode has to compute all of the prompt, whatever is cached: for its logits
        """
        fleet = self.fleet
        prefills = [] if whole else fleet.candidates(PREFILL)
        decodes = [
            worker for worker in fleet.candidates(DECODE) if worker.info and worker.info.incarnation not in without
        ]
        await prompt.hash_for(worker.info for worker in [*prefills, *decodes] if worker.info is not None)
        known: dict[int, tuple[dict[str, int], AgentBlocks]] = {}  # by the list of names: what the index says of it

        def views(workers: list[WorkerConnection]) -> list[WorkerView]:
            found = []
            for worker in workers:
                if not worker.is_connected or worker.info is None:
                    continue  # lost while the prompt was hashed
                hashes = [] if whole else prompt.hashes(worker.info)
                if id(hashes) not in known:
                    held = fleet.index.lookup(hashes)
                    known[id(hashes)] = held, AgentBlocks(held)
                held, at_agents = known[id(hashes)]
                found.append(worker.view(hashes, held.get(worker.address, 0), at_agents, now))
            return found

        return place(num_tokens, views(prefills), views(decodes), costs=self.costs, affinity=prompt.affinity)
