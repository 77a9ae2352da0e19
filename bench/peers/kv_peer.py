"""Another project's transfer of KV blocks between two processes of this machine, for bench/peers/kv.py.

    python bench/peers/kv_peer.py nixl|mooncake BLOCK_BYTES NUM_BLOCKS[,…]      in that project's virtual environment

The source has a buffer in shared memory, as an agent's arena; the target reads blocks out of it into a buffer of its
own. One line of JSON for each number of blocks: GB/s and ms (medians), CPU seconds per GB of both processes. Blocks
are next to each other in both buffers. Nothing is checked but that the bytes came. UCX_TLS=tcp makes NIXL use TCP.
"""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

SECONDS = 1.0
MIN_ROUNDS = 4
LOOK_SECONDS = 0.0002  # NIXL's source lends a hand where reads are emulated (TCP)
HOST = "127.0.0.1"

Read = Callable[[int, int], None]  # (block_bytes, num_blocks): returns when they are there


def memory(num_bytes: int, value: int) -> np.ndarray:
    """Shared, all of it touched."""
    array = np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8)
    array[:] = value
    return array


# --- NIXL: no thread of its own for progress on either side, which measured best ---


def nixl_agent(name: str, array: np.ndarray) -> Any:
    import nixl._api as nixl

    agent = nixl.nixl_agent(name, nixl.nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
    agent.register_memory([(array.ctypes.data, array.nbytes, 0, "")], "DRAM")
    return agent


def nixl_source(pipe: Connection, array: np.ndarray) -> None:
    agent = nixl_agent("source", array)
    pipe.send((agent.get_agent_metadata(), array.ctypes.data))
    while not pipe.poll(LOOK_SECONDS):
        agent.update_notifs()


def nixl_target(pipe: Connection, array: np.ndarray) -> Read:
    metadata, base = pipe.recv()
    agent = nixl_agent("target", array)
    peer = agent.add_remote_agent(metadata)

    def read(block_bytes: int, num_blocks: int) -> None:
        offsets = [index * block_bytes for index in range(num_blocks)]
        ours = agent.get_xfer_descs([(array.ctypes.data + offset, block_bytes, 0) for offset in offsets], "DRAM")
        theirs = agent.get_xfer_descs([(base + offset, block_bytes, 0) for offset in offsets], "DRAM")
        handle = agent.initialize_xfer("READ", ours, theirs, peer)
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        assert state == "DONE", state
        agent.release_xfer_handle(handle)

    return read


# --- Mooncake: its transfer engine over TCP, peers find each other without a metadata server ---


def mooncake_engine(array: np.ndarray) -> Any:
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    assert engine.initialize(HOST, "P2PHANDSHAKE", "tcp", "") == 0
    assert engine.register_memory(array.ctypes.data, array.nbytes) == 0
    return engine


def mooncake_source(pipe: Connection, array: np.ndarray) -> None:
    engine = mooncake_engine(array)
    pipe.send((f"{HOST}:{engine.get_rpc_port()}", array.ctypes.data))
    pipe.recv()


def mooncake_target(pipe: Connection, array: np.ndarray) -> Read:
    peer, base = pipe.recv()
    engine = mooncake_engine(array)

    def read(block_bytes: int, num_blocks: int) -> None:
        offsets = [index * block_bytes for index in range(num_blocks)]
        ours = [array.ctypes.data + offset for offset in offsets]
        theirs = [base + offset for offset in offsets]
        assert engine.batch_transfer_sync_read(peer, ours, theirs, [block_bytes] * num_blocks) == 0

    return read


SOURCES = {"nixl": nixl_source, "mooncake": mooncake_source}
TARGETS = {"nixl": nixl_target, "mooncake": mooncake_target}


def source(name: str, num_bytes: int, pipe: Connection) -> None:
    SOURCES[name](pipe, memory(num_bytes, 7))


def cpu_seconds(pid: int) -> float:
    return time.clock_gettime((~pid << 3) | 2)


def measure(read: Read, array: np.ndarray, pids: list[int], block_bytes: int, num_blocks: int) -> dict[str, float]:
    read(block_bytes, num_blocks)
    assert array[: block_bytes * num_blocks].min() == 7
    seconds: list[float] = []
    cpu, end = sum(map(cpu_seconds, pids)), time.monotonic() + SECONDS
    while len(seconds) < MIN_ROUNDS or time.monotonic() < end:
        start = time.monotonic()
        read(block_bytes, num_blocks)
        seconds.append(time.monotonic() - start)
    cpu = sum(map(cpu_seconds, pids)) - cpu
    gigabytes, median = block_bytes * num_blocks / 1e9, statistics.median(seconds)
    return {
        "block_bytes": block_bytes,
        "num_blocks": num_blocks,
        "gb_per_second": gigabytes / median,
        "cpu_seconds_per_gb": cpu / len(seconds) / gigabytes,
        "ms": median * 1000,
    }


def main(name: str, block_bytes: int, counts: list[int]) -> None:
    num_bytes = block_bytes * max(counts)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=source, args=(name, num_bytes, theirs), daemon=True)
    process.start()
    assert process.pid is not None
    array = memory(num_bytes, 0)
    read = TARGETS[name](ours, array)
    for num_blocks in counts:
        print(json.dumps(measure(read, array, [os.getpid(), process.pid], block_bytes, num_blocks)), flush=True)
    ours.send(None)
    process.join(5)
    os._exit(0)  # libraries' threads that never end


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), [int(count) for count in sys.argv[3].split(",")])
