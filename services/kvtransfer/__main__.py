"""python -m services.kvtransfer"""

from __future__ import annotations

from services.common.lifecycle import Process, run_service
from services.common.nixl import leave
from services.kvtransfer.agent import start_agent
from services.kvtransfer.config import KvTransferSettings


async def serve(settings: KvTransferSettings, process: Process) -> None:
    agent = await start_agent(settings, process)
    process.ready(address=agent.address)


def main() -> None:
    leave(run_service("kvtransfer", KvTransferSettings, serve))


if __name__ == "__main__":
    main()
