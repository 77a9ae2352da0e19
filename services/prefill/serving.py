"""Putting a prefill worker together."""

from __future__ import annotations

from services.common.grpc import Registration
from services.common.lifecycle import Process
from services.kvtransfer.client import KvAgentClient
from services.pb import prefill_pb2_grpc, worker_pb2
from services.prefill.config import PrefillSettings
from services.prefill.servicer import PrefillServicer
from services.worker.process import serve_worker
from services.worker.receiving import BlockReceiver
from services.worker.worker import Worker


async def serve_prefill(settings: PrefillSettings, process: Process) -> None:
    def registration(worker: Worker, agent: KvAgentClient | None) -> Registration:
        assert agent is not None
        servicer = PrefillServicer(worker, agent, BlockReceiver(agent, worker))
        add = prefill_pb2_grpc.add_PrefillServiceServicer_to_server
        return Registration(add, servicer, "relevo.v1.PrefillService")

    await serve_worker(settings, process, worker_pb2.ROLE_PREFILL, registration)
