"""One end of `relevo bench kv`: a worker without an engine, told by lines of JSON on its standard input what to do.

    {"op": "write", "first": 0, "count": 64}      announce blocks of these numbers; → {"ok": true}; then, in turns:
        {"op": "fill", "count": 16}                copy the next ones into their slots; → {"ok": true}
        {"op": "seal"}                             seal them, in one message; → {"began": s}
        {"op": "go"}                               copy and seal all that are left, part by part; → {"began": s}
        {"op": "end"}                              → {"ok": true}
    {"op": "read", "first": 0, "count": 64, "chunk": 16, "source": "host:port"}
                                                  open a fetch; → {"ok": true}; copy what comes into the pool; after
                                                  each chunk → {"ended": s, "good": n}
    {"op": "audit"}                               → {"in_use": n}, slots and streams at the agent
    {"op": "memcpy", "count": 16}                  → {"seconds": s, "cpu_seconds": s}

Times are of the monotonic clock, which all processes of a host share.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import uvloop

with suppress(ImportError):
    import numba  # noqa: F401  # as workers do: their client copies with it then

from services.common.security import Security
from services.kvtransfer.client import KvAgentClient, Publication, read_blocks, write_blocks
from services.kvtransfer.mapping import load_checked_copy, prepare

# Copied and sealed at once: the reader takes one part while the next is written, and each costs over a millisecond.
MIN_PART_BYTES, MAX_PART_BYTES = 4 << 20, 32 << 20
READ_PART_BYTES = 16 << 20  # what a reader that is cancelled still waits for
TIMEOUT_SECONDS = 60.0
Pool = npt.NDArray[np.uint8]


def block_name(number: int) -> bytes:
    return hashlib.sha256(number.to_bytes(8, "little")).digest()


def names(first: int, count: int) -> list[bytes]:
    return [block_name(number) for number in range(first, first + count)]


def parts(indices: Sequence[int], block_bytes: int, part_bytes: int) -> list[Sequence[int]]:
    size = max(1, part_bytes // block_bytes)
    return [indices[start : start + size] for start in range(0, len(indices), size)]


class End:
    """pool: [num_blocks, block_bytes], where an engine's KV cache would be."""

    def __init__(self, client: KvAgentClient, pool: Pool) -> None:
        self._client = client
        self._pool = pool
        self._block_bytes = pool.shape[1]

    async def serve(self) -> None:
        lines = _read_lines()
        async for line in lines:
            command = orjson.loads(line)
            match command["op"]:
                case "write":
                    await self._write(command, lines)
                case "read":
                    await self._read(command)
                case "audit":
                    audit = await self._client.audit()
                    in_use = audit.num_granted + audit.num_pinned + audit.num_leases + audit.num_fetches
                    _say({"in_use": in_use})
                case "memcpy":
                    _say(await asyncio.to_thread(self._memcpy, command["count"]))

    async def _write(self, command: dict[str, Any], lines: AsyncIterator[bytes]) -> None:
        count, num_sealed = command["count"], 0
        filled: list[tuple[int, int]] = []  # index, checksum
        async with self._client.publish(names(command["first"], count)) as publication:
            assert len(publication.granted) == count, "the agent has these blocks already"
            _say({"ok": True})
            async for line in lines:
                turn = orjson.loads(line)
                began = time.monotonic()
                match turn["op"]:
                    case "fill":
                        filled = await self._fill(publication, range(num_sealed, num_sealed + turn["count"]))
                        _say({"ok": True})
                    case "seal":
                        await publication.seal(filled)
                        num_sealed += len(filled)
                        _say({"began": began})
                    case "go":
                        await self._write_all(publication, range(num_sealed, count))
                        _say({"began": began})
                    case "end":
                        break
        _say({"ok": True})

    async def _write_all(self, publication: Publication, indices: Sequence[int]) -> None:
        """While one part is being sealed the next one is copied."""
        sealing: asyncio.Task[None] | None = None
        part_bytes = min(MAX_PART_BYTES, max(MIN_PART_BYTES, len(indices) * self._block_bytes // 4))
        for part in parts(indices, self._block_bytes, part_bytes):
            filled = await self._fill(publication, part)
            if sealing is not None:
                await sealing
            sealing = asyncio.create_task(publication.seal(filled))
        if sealing is not None:
            await sealing

    async def _fill(self, publication: Publication, indices: Sequence[int]) -> list[tuple[int, int]]:
        slots = [publication.slot(index) for index in indices]
        sources = [self._pool[index % len(self._pool)] for index in indices]
        return list(zip(indices, await asyncio.to_thread(write_blocks, slots, sources), strict=True))

    async def _read(self, command: dict[str, Any]) -> None:
        chunk, good, num_read, ended = command["chunk"], 0, 0, 0.0
        timeout_seconds = command.get("timeout_seconds", TIMEOUT_SECONDS)
        wanted = names(command["first"], command["count"])
        async with self._client.fetch(wanted, command["source"], timeout_seconds=timeout_seconds) as fetch:
            _say({"ok": True})
            async for batch in fetch:
                arrived = {block.index: block for block in batch.arrived}
                num_read += len(batch.missing)
                for part in parts(sorted(arrived), self._block_bytes, READ_PART_BYTES):
                    slots = [fetch.slot(arrived[index]) for index in part]
                    checksums = [arrived[index].checksum for index in part]
                    into = [self._pool[index % len(self._pool)] for index in part]
                    good += sum(await asyncio.to_thread(read_blocks, slots, into, checksums))
                    ended = time.monotonic()
                    num_read += len(part)
                await fetch.release(list(arrived))  # one message
                while num_read >= chunk:
                    _say({"ended": ended, "good": good})
                    num_read, good = num_read - chunk, 0

    def _memcpy(self, count: int) -> dict[str, float]:
        """From one half of the pool to the other, a block at a time."""
        half = len(self._pool) // 2
        began, cpu = time.monotonic(), time.process_time()
        for index in range(count):
            np.copyto(self._pool[half + index % half], self._pool[index % half])
        return {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - cpu}


async def _read_lines() -> AsyncIterator[bytes]:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        yield line


def _say(reply: dict[str, Any]) -> None:
    sys.stdout.buffer.write(orjson.dumps(reply) + b"\n")
    sys.stdout.buffer.flush()


async def main(agent: str, name: str, block_bytes: int, num_blocks: int) -> None:
    pool = np.random.default_rng(len(name)).integers(0, 256, (num_blocks, block_bytes), np.uint8)
    security = Security(os.environ.get("RELEVO_KV_TOKEN"))
    client = KvAgentClient(agent, name, "bench", security)
    try:
        mapping = await client.attach(b"b" * 32, block_bytes)
        await asyncio.to_thread(prepare, mapping.view)  # the state of a worker that has used every slot once
        await asyncio.to_thread(load_checked_copy)
        _say({"ok": True})
        await End(client, pool).serve()
    finally:
        await client.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("agent")
    parser.add_argument("name")
    parser.add_argument("block_bytes", type=int)
    parser.add_argument("num_blocks", type=int)
    arguments = vars(parser.parse_args())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(**arguments))
