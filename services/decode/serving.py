"""Putting a decode worker together."""

from __future__ import annotations

from services.common.grpc import Registration
from services.common.lifecycle import Process
from services.decode.config import DecodeSettings
from services.decode.servicer import DecodeServicer
from services.kvtransfer.client import KvAgentClient
from services.pb import decode_pb2_grpc, worker_pb2
from services.worker.process import serve_worker
from services.worker.receiving import BlockReceiver
from services.worker.worker import Worker


async def serve_decode(settings: DecodeSettings, process: Process) -> None:
    def registration(worker: Worker, agent: KvAgentClient | None) -> Registration:
        receiver = BlockReceiver(agent, worker) if agent is not None else None
        servicer = DecodeServicer(worker, receiver)
        return Registration(decode_pb2_grpc.add_DecodeServiceServicer_to_server, servicer, "relevo.v1.DecodeService")

    await serve_worker(settings, process, worker_pb2.ROLE_DECODE, registration)
