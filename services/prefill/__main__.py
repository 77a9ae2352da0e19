"""python -m services.prefill"""

from __future__ import annotations

import sys

from relevo.core.errors import StartupError
from services.common.grpc import Registration
from services.common.lifecycle import Process, run_service
from services.kvtransfer.client import KvAgentClient
from services.pb import prefill_pb2_grpc, worker_pb2
from services.prefill.config import PrefillSettings
from services.prefill.servicer import PrefillServicer
from services.worker.process import serve_worker
from services.worker.receiving import BlockReceiver
from services.worker.worker import Worker


async def serve(settings: PrefillSettings, process: Process) -> None:
    if not settings.kv_agent:
        raise StartupError("--kv-agent (or RELEVO_KV_AGENT) is missing: a prefill worker hands its blocks over there")

    def registration(worker: Worker, agent: KvAgentClient | None) -> Registration:
        assert agent is not None
        servicer = PrefillServicer(worker, agent, BlockReceiver(agent, worker))
        add = prefill_pb2_grpc.add_PrefillServiceServicer_to_server
        return Registration(add, servicer, "relevo.v1.PrefillService")

    await serve_worker(settings, process, worker_pb2.ROLE_PREFILL, registration)


def main() -> None:
    sys.exit(run_service("prefill", PrefillSettings, serve))


if __name__ == "__main__":
    main()
