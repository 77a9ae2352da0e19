"""The router's side door: what it knows of the fleet."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio

from services.common.grpc import Registration
from services.pb import router_pb2, router_pb2_grpc
from services.router.fleet import Fleet


class RouterServicer(router_pb2_grpc.RouterServicer):
    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def ListWorkers(
        self, request: router_pb2.ListWorkersRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> router_pb2.ListWorkersReply:
        now = asyncio.get_running_loop().time()
        return router_pb2.ListWorkersReply(
            workers=[
                router_pb2.WorkerState(
                    address=worker.address,
                    connected=worker.is_connected,
                    info=worker.info,
                    load=worker.load.report,
                    num_known_blocks=self._fleet.index.num_blocks(worker.address),
                    num_requests=worker.num_requests,
                    condition=worker.condition(now),
                )
                for worker in self._fleet.workers
            ]
        )


def registration(fleet: Fleet) -> Registration:
    return Registration(router_pb2_grpc.add_RouterServicer_to_server, RouterServicer(fleet), "relevo.v1.Router")
