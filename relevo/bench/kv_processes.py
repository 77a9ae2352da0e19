"""The processes of `relevo bench kv`: agents and workers' ends, none left behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import orjson

from relevo.core.errors import RelevoError, StartupError

END_SECONDS = 10.0
IDLE_SECONDS = 30.0
IDLE_PAUSE_SECONDS = 0.3
IDLE_CPU_SECONDS = 0.01
_LINK = re.compile(r": link to \S+: (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class AgentProcess:
    pid: int
    address: str
    log: Path

    def link(self) -> str:
        """What this agent measured on its link, and why it took that transport, in its own words."""
        found = _LINK.findall(self.log.read_text())
        return found[-1] if found else "no link"


@dataclass
class EndProcess:
    """Takes commands, one line of JSON each."""

    process: subprocess.Popen[bytes]
    requests: IO[bytes] = field(init=False)
    replies: IO[bytes] = field(init=False)

    def __post_init__(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.requests, self.replies = self.process.stdin, self.process.stdout

    @property
    def pid(self) -> int:
        return self.process.pid

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        self.send(command)
        return self.reply()

    def send(self, command: dict[str, Any]) -> None:
        self.requests.write(orjson.dumps(command) + b"\n")
        self.requests.flush()

    def reply(self) -> dict[str, Any]:
        line = self.replies.readline()
        if not line:
            raise RelevoError(f"a worker of the benchmark ended with code {self.process.wait(END_SECONDS)}")
        reply: dict[str, Any] = orjson.loads(line)
        return reply


def start_agent(stack: ExitStack, arena_bytes: int, path: str) -> AgentProcess:
    """A KV agent that knows one transport; ends with the stack. Raises StartupError."""
    ready, fd = os.pipe()
    lifeline, keep = os.pipe()
    stack.callback(os.close, keep)
    log = Path(stack.enter_context(TemporaryDirectory(prefix="relevo-bench-"))) / "log"
    flags = {
        "port": "0",
        "ready-fd": str(fd),
        "lifeline-fd": str(lifeline),
        "kv-arena": str(arena_bytes),
        "log-level": "info",
        "drain-seconds": "1",
        "transports": path if path != "shared memory" else "tcp",
    }
    command = [sys.executable, "-m", "services.kvtransfer", *(f"--{name}={value}" for name, value in flags.items())]
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, pass_fds=(fd, lifeline), stderr=stderr)
    stack.callback(end_process, process)
    os.close(fd)
    os.close(lifeline)
    with os.fdopen(ready, "rb") as lines:
        line = lines.readline()
    if not line:
        raise StartupError(f"the benchmark's KV agent did not start: {log.read_text().strip()}")
    return AgentProcess(process.pid, orjson.loads(line)["address"], log)


def start_end(stack: ExitStack, agent: str, name: str, block_bytes: int, num_blocks: int) -> EndProcess:
    """A worker's end with a pool of num_blocks, attached to an agent; ends with the stack."""
    command = [sys.executable, "-m", "services.kvtransfer.bench_end", agent, name, str(block_bytes), str(num_blocks)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    stack.callback(end_process, process)
    end = EndProcess(process)
    stack.callback(end.requests.close)  # its end of file ends it
    end.reply()
    return end


def cpu_seconds(pid: int) -> float:
    """Of all threads of a process since its start, exact to the nanosecond."""
    return time.clock_gettime((~pid << 3) | 2)  # clock_getcpuclockid(3), which Python lacks


def wait_until_idle(pids: Sequence[int]) -> None:
    """Until these processes have done nothing for a moment, or a while has passed."""
    end = time.monotonic() + IDLE_SECONDS
    before = -1.0
    while time.monotonic() < end and (now := sum(map(cpu_seconds, pids))) - before > IDLE_CPU_SECONDS:
        before = now
        time.sleep(IDLE_PAUSE_SECONDS)


def end_process(process: subprocess.Popen[bytes]) -> None:
    """By SIGTERM, and by force if that does not do it in time."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
