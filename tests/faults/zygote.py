"""A process that has imported everything and forks services: one starts in a fraction of the time, and can be struck.

    python -m tests.faults.zygote      reads a line of JSON a command, answers each with one

    {"start": role, "flags": […], "fault": {…} or null}   →  {"pid": …, "address": …}, when it is ready
    {"wait": pid}                                          →  {"status": …}, when it has ended

No thread may run here before the fork: nothing is computed, and gRPC is not used. Children die with it.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Literal

from tests.faults.disturb import Fault, install

Role = Literal["kvtransfer", "prefill", "decode"]
_PR_SET_PDEATHSIG = 1


class Zygote:
    """Its other end, in the test. Blocking: a start takes a second."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, role: Role, *flags: str, fault: Fault | None = None) -> Forked:
        reply = self._ask({"start": role, "flags": flags, "fault": None if fault is None else asdict(fault)})
        return Forked(self, reply["pid"], reply["address"])

    def wait(self, pid: int) -> int:
        """As Popen.wait: minus the signal's number, if it was one."""
        status: int = self._ask({"wait": pid})["status"]
        return status

    def close(self) -> None:
        with self._process as process:
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(20) == 0

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(command), file=self._process.stdin, flush=True)
        reply: dict[str, Any] = json.loads(self._process.stdout.readline())
        assert "error" not in reply, reply["error"]
        return reply


class Forked:
    """A service's process."""

    def __init__(self, zygote: Zygote, pid: int, address: str) -> None:
        self.pid = pid
        self.address = address
        self._zygote = zygote
        self._has_ended = False

    @property
    def port(self) -> str:
        return self.address.rpartition(":")[2]

    @property
    def is_stopped(self) -> bool:
        """By SIGSTOP."""
        with open(f"/proc/{self.pid}/stat") as file:  # noqa: PTH123  # as short as it gets
            return file.read().rpartition(")")[2].split()[0] == "T"

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)  # a zombie until wait(): the pid is no other process's

    def wait(self) -> int:
        """Until it has ended."""
        status = self._zygote.wait(self.pid)
        self._has_ended = True
        return status

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """If it runs still."""
        if not self._has_ended:
            self.send(number)
            self.send(signal.SIGCONT)
            self.wait()


@contextmanager
def running_zygote() -> Iterator[Zygote]:
    zygote = Zygote()
    try:
        yield zygote
    finally:
        zygote.close()


def main() -> None:
    for module in (
        "services.decode.serving",
        "services.prefill.serving",
        "services.kvtransfer.agent",
        "services.kvtransfer.config",
        "relevo.kernels.reference",
    ):
        importlib.import_module(module)
    gc.freeze()
    for line in sys.stdin:
        command = json.loads(line)
        if "start" in command:
            reply = _start(command["start"], command["flags"], command["fault"])
        else:
            reply = {"status": os.waitstatus_to_exitcode(os.waitpid(command["wait"], 0)[1])}
        print(json.dumps(reply), flush=True)


def _start(role: str, flags: list[str], fault: dict[str, Any] | None) -> dict[str, Any]:
    ready_read, ready_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(ready_read)
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            os.dup2(2, 1)
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if fault is not None:
                install(Fault(**fault))
            code = _serve(role, [*flags, f"--ready-fd={ready_write}"])
        finally:
            os._exit(code if "code" in locals() else 1)
    os.close(ready_write)
    with os.fdopen(ready_read) as lines:
        line = lines.readline()
    if not line:
        return {"error": f"{role} could not start: status {os.waitpid(pid, 0)[1]}"}
    return {"pid": pid, "address": json.loads(line)["address"]}


def _serve(role: str, argv: list[str]) -> int:
    from services.common.lifecycle import run_service

    entry = importlib.import_module(f"services.{role}.__main__")
    settings = {"kvtransfer": "KvTransferSettings", "prefill": "PrefillSettings", "decode": "DecodeSettings"}[role]
    return run_service(role, getattr(entry, settings), entry.serve, argv)


if __name__ == "__main__":
    main()
