"""A whole Relevo on this machine: agent, workers and router as child processes, started and stopped together."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

from relevo.core.errors import StartupError

Topology = Literal["disaggregated", "aggregated"]

WORKERS = ("prefill", "decode")
STOP_MARGIN_SECONDS = 7.0  # beyond a child's own drain, before it is killed


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """worker_options: flags of prefill and decode workers, e.g. {"block-size": "16", "passes": True}; agent_options and
    router_options likewise.

    take_turns: several workers that compute on the CPU do so one at a time, each with all cores (docs/adr/0007)
    """

    model: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    num_prefill: int = 1
    num_decode: int = 1
    topology: Topology = "disaggregated"
    kv_arena: str = "256MiB"
    api_key: str | None = None
    log_level: str = "warning"
    drain_seconds: float = 10.0
    start_seconds: float = 600.0
    take_turns: bool = True
    agent_options: Mapping[str, str | bool] = field(default_factory=dict)
    worker_options: Mapping[str, str | bool] = field(default_factory=dict)
    router_options: Mapping[str, str | bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Child:
    role: str
    name: str
    address: str
    pid: int
    process: subprocess.Popen[bytes]


class Stack:
    """Context manager: children run inside it, and none is left after it, however it is left.

    A child whose launcher vanishes notices by its lifeline (a pipe that nobody writes to) and stops by itself.
    """

    def __init__(self, config: StackConfig) -> None:
        self.config = config
        self.children: list[Child] = []  # in order of start; stopped in reverse
        self._lifeline_read, self._lifeline_write = os.pipe()
        self._ready_fds: dict[int, Child] = {}
        self._turns_fd: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.stop()
        finally:
            os.close(self._lifeline_read)
            os.close(self._lifeline_write)
            if self._turns_fd is not None:
                os.close(self._turns_fd)

    @property
    def endpoint(self) -> str:
        host = "127.0.0.1" if self.config.host in ("0.0.0.0", "::") else self.config.host
        return f"http://{host}:{self.config.port}"

    def start(self) -> None:
        """Start all at once and return when the endpoint serves. Raises StartupError when one of them can't."""
        _check_port(self.config.host, self.config.port)
        split = self.config.topology == "disaggregated"
        prefill_names = [f"prefill-{index}" for index in range(self.config.num_prefill if split else 0)]
        decode_names = [f"decode-{index}" for index in range(self.config.num_decode)]
        names = ["kvtransfer"] * split + prefill_names + decode_names + ["router"]
        ports = dict(zip(names, _free_ports(len(names)), strict=True))
        address = {name: f"127.0.0.1:{port}" for name, port in ports.items()}

        if self.config.take_turns and len(prefill_names + decode_names) > 1 and hasattr(os, "memfd_create"):
            self._turns_fd = os.memfd_create("turns", os.MFD_CLOEXEC)
        if split:
            agent_options = {"kv-arena": self.config.kv_arena, **self.config.agent_options}
            self._spawn("kvtransfer", "kvtransfer", ports["kvtransfer"], agent_options)
        for role, worker_names in (("prefill", prefill_names), ("decode", decode_names)):
            for name in worker_names:
                options = {**self.config.worker_options, "worker-id": name, "kv-agent": address.get("kvtransfer", "")}
                self._spawn(role, name, ports[name], options)
        self._spawn(
            "router",
            "router",
            ports["router"],
            {
                **self.config.router_options,
                "http-host": self.config.host,
                "http-port": str(self.config.port),
                "prefill": ",".join(address[name] for name in prefill_names),
                "decode": ",".join(address[name] for name in decode_names),
            },
        )
        self._await_ready()

    def wait(self) -> Child:
        """Until a child ends, which it should not; returns it."""
        while True:
            for child in self.children:
                if child.process.poll() is not None:
                    return child
            time.sleep(0.2)

    def stop(self) -> None:
        """Router first: nothing new comes in; then the workers together; the agent last. Bounded; kills what hangs."""
        for roles in (("router",), WORKERS, ("kvtransfer",)):
            self._stop([child for child in self.children if child.role in roles])
        self.children.clear()
        for fd in self._ready_fds:
            os.close(fd)
        self._ready_fds.clear()

    def _spawn(self, role: str, name: str, port: int, options: Mapping[str, str | bool]) -> None:
        ready_read, ready_write = os.pipe()
        flags: dict[str, str | bool] = {
            **options,
            "port": str(port),
            "ready-fd": str(ready_write),
            "lifeline-fd": str(self._lifeline_read),
            "drain-seconds": str(self.config.drain_seconds),
            "log-level": self.config.log_level,
        }
        if role != "kvtransfer" and self.config.model is not None:
            flags["model"] = self.config.model
        inherited = [ready_write, self._lifeline_read]
        if role in WORKERS and self._turns_fd is not None:
            flags["turn-file"] = f"/proc/self/fd/{self._turns_fd}"
            inherited.append(self._turns_fd)
        command = [sys.executable, "-m", f"services.{role}"]
        command += [_argument(flag, value) for flag, value in flags.items() if value != ""]
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=inherited,
                # Out of the terminal's process group: Ctrl-C reaches the launcher alone, which stops them in order.
                start_new_session=True,
                env=self._environment(role),
            )
        except BaseException:
            os.close(ready_read)
            raise
        finally:
            os.close(ready_write)
        child = Child(role, name, f"127.0.0.1:{port}", process.pid, process)
        self.children.append(child)
        self._ready_fds[ready_read] = child

    def _environment(self, role: str) -> dict[str, str]:
        environment = dict(os.environ)
        if self.config.api_key is not None and role == "router":
            environment["RELEVO_API_KEY"] = self.config.api_key  # not a flag: flags show in `ps`
        if role in WORKERS and (self.config.topology == "disaggregated" or self.config.num_decode > 1):
            # Workers share the cores: an idle thread of one must not spin on the other's.
            environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        return environment

    def _await_ready(self) -> None:
        deadline = time.monotonic() + self.config.start_seconds
        with selectors.DefaultSelector() as selector:
            for fd in self._ready_fds:
                selector.register(fd, selectors.EVENT_READ)
            while self._ready_fds:
                events = selector.select(timeout=max(0.0, deadline - time.monotonic()))
                if not events:
                    late = ", ".join(child.name for child in self._ready_fds.values())
                    raise StartupError(f"not ready after {self.config.start_seconds:.0f} s: {late}")
                for key, _ in events:
                    selector.unregister(key.fd)
                    _read_ready_line(key.fd, self._ready_fds[key.fd])
                    del self._ready_fds[key.fd]
                    os.close(key.fd)

    def _stop(self, children: Sequence[Child]) -> None:
        for child in children:
            if child.process.poll() is None:
                child.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + self.config.drain_seconds + STOP_MARGIN_SECONDS
        try:
            for child in children:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.process.wait(timeout=max(0.0, deadline - time.monotonic()))
        finally:  # also when a second Ctrl-C arrives while waiting
            for child in children:
                if child.process.poll() is None:
                    child.process.kill()
                    child.process.wait()


def _argument(flag: str, value: str | bool) -> str:
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag}={value}"


def _read_ready_line(fd: int, child: Child) -> None:
    """Raises StartupError if the pipe was closed without the line: the child could not start, and has said why."""
    line = b""
    while not line.endswith(b"\n") and (part := os.read(fd, 4096)):
        line += part
    if not line.endswith(b"\n"):
        code = child.process.wait(timeout=30)
        raise StartupError(f"{child.name} could not start (exit code {code}); its reason stands above")
    json.loads(line)


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise StartupError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another with --port"
            ) from error


def _free_ports(count: int) -> Iterator[int]:
    """Ports that are free now, all different. If somebody takes one before its child does, that child says so."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in sockets]
    return iter(ports)
