"""The Dispatcher over a fleet of workers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry

from relevo.core.placement import CostModel
from services.pb import messages_pb2
from services.router.fleet import Fleet
from services.router.fleet_state import describe_fleet
from services.router.generation import ServedModel
from services.router.planner import Planner
from services.router.request_stream import DECODE
from services.router.route_log import Predictions, RouteLog, RouteRecord
from services.router.routed import RoutedGeneration


class FleetDispatcher:
    """The Dispatcher over a fleet of workers."""

    def __init__(
        self,
        fleet: Fleet,
        eos_token_ids: Iterable[int] = (),
        costs: CostModel | None = None,
        *,
        registry: CollectorRegistry | None = None,
    ) -> None:
        """registry: where predictions are compared with what came of them; None: nowhere that is shown."""
        self._fleet = fleet
        self._eos_token_ids = frozenset(eos_token_ids)
        self._planner = Planner(
            fleet, costs or CostModel(), RouteLog(), Predictions(CollectorRegistry() if registry is None else registry)
        )

    def generate(self, request: messages_pb2.GenerationRequest) -> RoutedGeneration:
        """Its deadline starts now, if it has one; nothing else does before the first __anext__."""
        stop_token_ids = frozenset(request.sampling.stop_token_ids)
        if not request.sampling.ignore_eos:
            stop_token_ids |= self._eos_token_ids
        return RoutedGeneration(self._planner, request, stop_token_ids)

    def model(self) -> ServedModel | None:
        return self._fleet.model()

    def is_ready(self) -> bool:
        return bool(self._fleet.candidates(DECODE))

    def complaint(self) -> str:
        return self._fleet.complaints(DECODE)

    def warning(self) -> str:
        return self._fleet.trouble

    def explain(self, request_id: str) -> Sequence[Mapping[str, Any]]:
        return [record.explain() | record.timeline.explain() for record in self._planner.log.find(request_id)]

    def records(self) -> Collection[RouteRecord]:
        return self._planner.log.records

    async def describe_fleet(self) -> Mapping[str, Any]:
        return await describe_fleet(self._fleet)
