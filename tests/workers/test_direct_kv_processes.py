"""A writer in a process of its own, which dies or stops while its cache is read, by NIXL itself."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import pytest
import torch
import xxhash

from relevo.engine.cache_memory import CacheMemory
from services.common.nixl import NotInstalled, load_nixl
from services.kvtransfer.client import DirectPlace
from services.pb.kvtransfer_pb2 import DirectMemory
from services.worker.direct_kv import READ_SECONDS, DirectKV, WantedBlock, _Peer
from services.worker.transfers import Transfers

NUM_BLOCKS, BLOCK_BYTES = 16, 1 << 20


@pytest.fixture(autouse=True)
def nixl_is_installed() -> None:
    try:
        load_nixl()
    except NotInstalled as error:
        pytest.skip(f"NIXL is not installed (pip install 'relevo[nixl]'): {error}")


def make_blocks() -> torch.Tensor:
    """Block i is full of i + 1."""
    numbers = torch.arange(1, NUM_BLOCKS + 1, dtype=torch.uint8)
    return numbers[:, None].expand(NUM_BLOCKS, BLOCK_BYTES).contiguous()


def show(pipe: Connection) -> None:
    """The writer."""
    memory = CacheMemory(make_blocks(), None)
    shows = DirectKV(memory, Transfers(), "writer", lambda work, _name: work.close(), lambda: True)
    pipe.send_bytes(shows.show().SerializeToString())
    pipe.poll(60)


Writer = tuple[BaseProcess, DirectMemory]


@pytest.fixture
def writer() -> Iterator[Writer]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=show, args=(theirs,), daemon=True)
    process.start()
    try:
        assert ours.poll(60)
        yield process, DirectMemory.FromString(ours.recv_bytes())
    finally:
        process.kill()
        process.join(10)


@pytest.fixture
def peer(writer: Writer) -> Iterator[_Peer]:
    """Connected; reads into zeros."""
    target = torch.zeros(NUM_BLOCKS, BLOCK_BYTES, dtype=torch.uint8)
    peer = _Peer(CacheMemory(target, None), writer[1], Transfers())
    peer.connect()
    assert peer.is_connected
    yield peer
    peer._disconnect()
    peer.executor.shutdown()


def wanted_from(memory: DirectMemory) -> list[WantedBlock]:
    checksums = [xxhash.xxh3_64_intdigest(block.numpy().data) for block in make_blocks()]
    return [WantedBlock(DirectPlace(memory, index), index, checksum) for index, checksum in enumerate(checksums)]


def check_nothing_comes_any_more(peer: _Peer) -> None:
    before = peer._ours._storage.clone()
    time.sleep(0.1)
    assert peer._ours._storage.equal(before)


def test_a_writer_that_is_killed_while_it_is_read(writer: Writer, peer: _Peer) -> None:
    process, memory = writer
    wanted = wanted_from(memory)
    is_read = threading.Event()

    def read_until_lost() -> None:
        while all(peer.read(wanted, None)):
            assert peer._ours._storage.equal(make_blocks())
            peer._ours._storage.zero_()
            is_read.set()

    with ThreadPoolExecutor(1) as thread:
        reading = thread.submit(read_until_lost)
        assert is_read.wait(10)
        process.kill()
        reading.result(10)
    assert not peer.is_connected
    check_nothing_comes_any_more(peer)


def test_a_writer_that_is_stopped_holds_nobody_up(writer: Writer, peer: _Peer) -> None:
    """Its memory can be read all the same, where the system reads it."""
    process, memory = writer
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    began = time.monotonic()
    right = peer.read(wanted_from(memory), None)
    assert time.monotonic() - began < READ_SECONDS + 2.0
    assert all(right) == peer.is_connected
    os.kill(process.pid, signal.SIGCONT)
    check_nothing_comes_any_more(peer)
