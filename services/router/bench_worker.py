"""A decode worker without a model, for `relevo bench router`: it speaks our contract, and its tokens cost nothing.

    python -m services.router.bench_worker --ready-fd 3

Reads lines on its standard input: "rate 40000" sets the tokens a second of each stream of a router, over all of its
requests together; "rate 0": one step after another, as fast as they are taken; "rate inf": each answer whole, in one
step. Ends with its input.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import sys
import uuid
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import uvloop

from services.common.grpc import Registration, make_server
from services.pb import decode_pb2, decode_pb2_grpc, messages_pb2, worker_pb2, worker_pb2_grpc

VOCAB_SIZE = 4096
_FIRST_TOKEN_ID, _NUM_TOKEN_IDS = 300, 3000  # plain ones, of the demo's tokenizer
_LOAD = messages_pb2.Load(
    num_free_blocks=1 << 20, prefill_tokens_per_second=1e7, step_seconds=1e-3, step_seconds_per_request=1e-6
)


class BenchWorker(decode_pb2_grpc.DecodeServiceServicer, worker_pb2_grpc.WorkerServicer):
    """tokens_per_second: see the module."""

    def __init__(self, worker_id: str) -> None:
        self.tokens_per_second = 0.0
        self._info = worker_pb2.WorkerInfo(
            worker_id=worker_id,
            incarnation=uuid.uuid4().hex,
            role=worker_pb2.ROLE_DECODE,
            model="bench",
            layout_fingerprint=bytes(32),
            block_size=16,
            block_bytes=1 << 16,
            num_blocks=1 << 20,
            max_model_len=1 << 20,
            vocab_size=VOCAB_SIZE,
            max_num_seqs=1 << 16,
        )

    async def GetInfo(self, request: Any, context: Any) -> worker_pb2.WorkerInfo:
        return self._info

    async def WatchBlocks(self, request: Any, context: Any) -> AsyncIterator[worker_pb2.BlockEvents]:
        yield worker_pb2.BlockEvents(snapshot=worker_pb2.Snapshot(first=True, last=True), load=_LOAD)
        while True:
            await asyncio.sleep(1.0)
            yield worker_pb2.BlockEvents(load=_LOAD)

    async def Generate(self, request_iterator: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:  # type: ignore[override]
        await context.send_initial_metadata(())
        stream = _Stream(self, context)
        async with asyncio.TaskGroup() as tasks:
            stepping = tasks.create_task(stream.step_on())
            while isinstance(command := await context.read(), decode_pb2.DecodeCommand):
                stream.obey(command)
            stepping.cancel()


class _Stream:
    """One router's requests: each gets a token a step."""

    def __init__(self, worker: BenchWorker, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self._worker = worker
        self._context = context
        self._left: dict[int, int] = {}  # handle → tokens to come
        self._accepted: list[int] = []
        self._filled = asyncio.Event()

    def obey(self, command: decode_pb2.DecodeCommand) -> None:
        if command.HasField("submit"):
            self._left[command.handle] = command.submit.request.sampling.max_tokens
            self._accepted.append(command.handle)
            self._filled.set()
        elif command.HasField("cancel"):
            self._left.pop(command.handle, None)

    async def step_on(self) -> None:
        loop = asyncio.get_running_loop()
        next_step, number = loop.time(), 0
        while True:
            if not self._left and not self._accepted:
                self._filled.clear()
                await self._filled.wait()
                next_step = loop.time()
            number += 1
            await self._context.write(self._step(_FIRST_TOKEN_ID + number % _NUM_TOKEN_IDS))
            if 0 < (rate := self._worker.tokens_per_second) < math.inf:
                next_step += max(1, len(self._left)) / rate
                if (wait := next_step - loop.time()) > 0:
                    await asyncio.sleep(wait)

    def _step(self, token_id: int) -> decode_pb2.DecodeUpdates:
        message = decode_pb2.DecodeUpdates(load=_LOAD)
        add = message.updates.add
        for handle in self._accepted:
            add(handle=handle).accepted.SetInParent()
        self._accepted.clear()
        ended = []
        is_whole = self._worker.tokens_per_second == math.inf
        for handle, num_left in self._left.items():
            num_tokens = num_left if is_whole else 1
            add(handle=handle).tokens.token_ids.extend([token_id] * num_tokens)
            self._left[handle] -= num_tokens
            if not self._left[handle]:
                ended.append(handle)
        for handle in ended:
            del self._left[handle]
            add(handle=handle).ended.finish_reason = messages_pb2.FINISH_REASON_LENGTH
        return message


async def _main(ready_fd: int) -> None:
    worker = BenchWorker(f"bench-{os.getpid()}")
    server = make_server([], "127.0.0.1", 0)
    server.register(
        Registration(decode_pb2_grpc.add_DecodeServiceServicer_to_server, worker, "relevo.v1.DecodeService")
    )
    server.register(Registration(worker_pb2_grpc.add_WorkerServicer_to_server, worker, "relevo.v1.Worker"))
    await server.start()
    os.write(ready_fd, (json.dumps({"address": server.address}) + "\n").encode())
    os.close(ready_fd)
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while line := await lines.readline():
        worker.tokens_per_second = float(line.split()[1])
    await server.stop(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ready-fd", type=int, required=True)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_main(parser.parse_args().ready_fd))
