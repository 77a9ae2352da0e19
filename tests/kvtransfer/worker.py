"""A worker in another process: `python -m tests.kvtransfer.worker publish|fetch AGENT LABEL…`.

Prints one line when it has what it came for, then waits until its standard input ends (or it is killed).
"""

from __future__ import annotations

import asyncio
import os
import sys

from services.common.security import Security
from services.kvtransfer.client import KvAgentClient, read_block

from .blocks import BLOCK_BYTES, FINGERPRINT, block_data, names, write_and_seal


async def publish(client: KvAgentClient, labels: list[str]) -> None:
    """Seals all but the last."""
    async with client.publish(names(*labels)) as publication:
        await write_and_seal(publication, labels, range(len(labels) - 1))
        await report("published")


async def fetch(client: KvAgentClient, labels: list[str]) -> None:
    """Reads what comes and keeps it pinned."""
    good = 0
    async with client.fetch(names(*labels), timeout_seconds=5.0) as fetching:
        async for batch in fetching:
            for block in batch.arrived:
                into = bytearray(BLOCK_BYTES)
                ok = read_block(fetching.slot(block), into, block.checksum)
                good += ok and bytes(into) == block_data(labels[block.index])
        await report(f"good {good}")


async def report(line: str) -> None:
    print(line, flush=True)
    await asyncio.to_thread(sys.stdin.read)


async def main(what: str, address: str, *labels: str) -> None:
    client = KvAgentClient(address, f"{what}-0", "incarnation", Security(os.environ.get("RELEVO_KV_TOKEN")))
    await client.attach(FINGERPRINT, BLOCK_BYTES)
    await {"publish": publish, "fetch": fetch}[what](client, list(labels))
    await client.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
