"""Two agents in two network namespaces, with delay, loss and a cap on the bandwidth between them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.slow_link import ADDRESSES, Shape, Unsupported, slow_link

BLOCK_BYTES = 196_608
NUM_BLOCKS = 16
SHAPE = Shape(delay_seconds=0.015, loss=0.005, bytes_per_second=12.5e6)
TOKEN = "a token for two agents that are not on loopback"

pytestmark = pytest.mark.timeout(90)


class Fleet:
    """An agent and a worker on each side; the link between them may be stopped."""

    def __init__(self, stack: ExitStack, folder: Path, namespaces: tuple[str, str]) -> None:
        self._stack = stack
        self._folder = folder
        self.addresses = [self._start_agent(*each) for each in zip(namespaces, ADDRESSES, strict=True)]
        pairs = zip(namespaces, self.addresses, strict=True)
        self.writer, self.reader = (self._start_end(*each) for each in pairs)

    def log(self, address: str) -> str:
        return (self._folder / f"{address}.log").read_text()

    def wait_until_unused(self) -> None:
        """No slot is granted or pinned and no stream open, at both agents: soon, as the last words are on their way."""
        end = time.monotonic() + 20
        while any(ask(each, {"op": "audit"})["in_use"] for each in (self.writer, self.reader)):
            assert time.monotonic() < end, "slots or streams are left"
            time.sleep(0.02)

    def _spawn(self, namespace: str, *command: str, **options: Any) -> subprocess.Popen[bytes]:
        environment = os.environ | {"RELEVO_KV_TOKEN": TOKEN}
        process = subprocess.Popen(
            ["ip", "netns", "exec", namespace, sys.executable, "-m", *command], env=environment, **options
        )

        def end() -> None:
            process.kill()
            process.wait(10)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

        self._stack.callback(end)
        return process

    def _start_agent(self, namespace: str, host: str) -> str:
        ready, fd = os.pipe()
        flags = ["--ready-fd", str(fd), "--host", host, "--port", "0", "--kv-arena", "16MiB", "--transports", "tcp"]
        arena_dir = self._folder / host
        arena_dir.mkdir()
        log = self._stack.enter_context((self._folder / f"{host}.log").open("wb"))
        self._spawn(namespace, "services.kvtransfer", *flags, "--arena-dir", str(arena_dir), pass_fds=(fd,), stderr=log)
        os.close(fd)
        with os.fdopen(ready) as lines:
            line = lines.readline()
        assert line, f"the agent did not start: {self.log(host)}"
        address: str = json.loads(line)["address"]
        return address

    def _start_end(self, namespace: str, agent: str) -> subprocess.Popen[bytes]:
        command = ("services.kvtransfer.bench_end", agent, "end", str(BLOCK_BYTES), str(NUM_BLOCKS))
        end = self._spawn(namespace, *command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        reply(end)
        return end


def tell(end: subprocess.Popen[bytes], command: dict[str, Any]) -> None:
    assert end.stdin is not None
    end.stdin.write(json.dumps(command).encode() + b"\n")
    end.stdin.flush()


def reply(end: subprocess.Popen[bytes]) -> dict[str, Any]:
    assert end.stdout is not None
    line = end.stdout.readline()
    assert line, "the worker's end is gone: see its standard error"
    result: dict[str, Any] = json.loads(line)
    return result


def ask(end: subprocess.Popen[bytes], command: dict[str, Any]) -> dict[str, Any]:
    tell(end, command)
    return reply(end)


@pytest.fixture(params=["kernel", "relay"])
def link(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Fleet, int | None]]:
    """The fleet, and the process id of what is between them, where it is a process."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    with ExitStack() as stack:
        try:
            namespaces, relay = stack.enter_context(slow_link(SHAPE, by_kernel=request.param == "kernel"))
        except Unsupported as error:
            pytest.skip(f"no slow link on this machine: {error}")
        yield Fleet(stack, tmp_path, namespaces), relay.pid if relay is not None else None


def hand_over(fleet: Fleet, first: int, timeout_seconds: float) -> tuple[int, float]:
    """NUM_BLOCKS, sealed as they are asked for; how many came whole, and how long it took."""
    ask(fleet.writer, {"op": "write", "first": first, "count": NUM_BLOCKS})
    began = time.monotonic()
    read = {"op": "read", "first": first, "count": NUM_BLOCKS, "chunk": NUM_BLOCKS, "source": fleet.addresses[0]}
    ask(fleet.reader, read | {"timeout_seconds": timeout_seconds})
    ask(fleet.writer, {"op": "go"})
    good: int = reply(fleet.reader)["good"]
    seconds = time.monotonic() - began
    ask(fleet.writer, {"op": "end"})
    return good, seconds


def test_blocks_come_whole_over_a_bad_link_and_the_agent_says_how_bad(link: tuple[Fleet, int | None]) -> None:
    fleet, _ = link
    good, _ = hand_over(fleet, 0, timeout_seconds=60)
    assert good == NUM_BLOCKS
    good, _ = hand_over(fleet, NUM_BLOCKS, timeout_seconds=60)
    assert good == NUM_BLOCKS
    log = fleet.log(ADDRESSES[1])
    said = re.search(r"link to \S+: tcp, (\S+) MB/s, (\S+) ms", log)
    assert said is not None, log
    assert float(said[1]) * 1e6 <= SHAPE.bytes_per_second * 1.2
    assert float(said[2]) / 1000 >= 2 * SHAPE.delay_seconds
    assert re.search(r"WARNING.*is slow: tcp brings \S+ MB/s, less than --link-floor 100.0 MB/s", log), log
    fleet.wait_until_unused()


def test_link_that_goes_dead_is_noticed_within_the_deadline_and_heals(link: tuple[Fleet, int | None]) -> None:
    fleet, relay = link
    if relay is None:
        pytest.skip("only a link of the relay can be stopped from here")
    assert hand_over(fleet, 0, timeout_seconds=60)[0] == NUM_BLOCKS
    ask(fleet.writer, {"op": "write", "first": 100, "count": NUM_BLOCKS})
    read = {"op": "read", "first": 100, "count": NUM_BLOCKS, "chunk": NUM_BLOCKS, "source": fleet.addresses[0]}
    ask(fleet.reader, read | {"timeout_seconds": 2.0})
    began = time.monotonic()
    os.kill(relay, signal.SIGSTOP)
    ask(fleet.writer, {"op": "go"})
    assert reply(fleet.reader)["good"] < NUM_BLOCKS
    assert time.monotonic() - began < 6
    ask(fleet.writer, {"op": "end"})
    os.kill(relay, signal.SIGCONT)
    first = 200
    end = time.monotonic() + 40
    while (good := hand_over(fleet, first, timeout_seconds=10)[0]) < NUM_BLOCKS and time.monotonic() < end:
        first += 100
    assert good == NUM_BLOCKS, "it comes back"
    fleet.wait_until_unused()
