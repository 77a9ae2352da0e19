"""A whole Relevo on this machine: agent, workers and router as child processes, started and stopped together."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

from relevo.child import DEATHS_SECONDS, MAX_DEATHS, Child, ChildSpec
from relevo.core.errors import StartupError
from relevo.engine.config import DEFAULT_GPU_MEMORY_UTILIZATION
from relevo.stack_state import ChildState, StackState, process_id, remove_state, write_state

logger = logging.getLogger(__name__)

Topology = Literal["disaggregated", "aggregated"]

WORKERS = ("prefill", "decode")
STOP_MARGIN_SECONDS = 7.0  # beyond a child's own drain, before it is killed
POLL_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """worker_options: flags of prefill and decode workers, e.g. {"block-size": "16", "passes": True}; agent_options and
    router_options likewise. Of a gpu-memory-utilization each worker gets an equal part.

    take_turns: several workers that compute on the CPU do so one at a time, each with all cores (docs/adr/0007)
    restart: a child that dies is started again
    chaos: the agent lets `relevo chaos` make it fail
    metrics: agent and workers serve /metrics, each on a port of its own (the router does in any case)
    """

    model: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    num_prefill: int = 1
    num_decode: int = 1
    num_routers: int = 1
    topology: Topology = "disaggregated"
    kv_arena: str = "256MiB"
    api_key: str | None = None
    log_level: str = "warning"
    drain_seconds: float = 10.0
    start_seconds: float = 600.0
    take_turns: bool = True
    restart: bool = True
    chaos: bool = False
    metrics: bool = False
    agent_options: Mapping[str, str | bool] = field(default_factory=dict)
    worker_options: Mapping[str, str | bool] = field(default_factory=dict)
    decode_options: Mapping[str, str | bool] = field(default_factory=dict)
    router_options: Mapping[str, str | bool] = field(default_factory=dict)


class Stack:
    """Context manager: children run inside it, and none is left after it, however it is left.

    A child whose launcher vanishes notices by its lifeline (a pipe that nobody writes to) and stops by itself.
    """

    def __init__(self, config: StackConfig) -> None:
        self.config = config
        self.children: list[Child] = []  # in order of start; stopped in reverse
        self.metrics_ports: dict[str, int] = {}  # by the child's name, if config.metrics
        self._lifeline_read, self._lifeline_write = os.pipe()
        self._turns_fd: int | None = None
        self._has_state = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.stop()
        finally:
            if self._has_state:
                remove_state(self.config.port)
            os.close(self._lifeline_read)
            os.close(self._lifeline_write)
            if self._turns_fd is not None:
                os.close(self._turns_fd)

    @property
    def endpoint(self) -> str:
        host = "127.0.0.1" if self.config.host in ("0.0.0.0", "::") else self.config.host
        scheme = "https" if "http-tls-cert" in self.config.router_options else "http"
        return f"{scheme}://{host}:{self.config.port}"

    def start(self) -> None:
        """Start all at once and return when the endpoint serves. Raises StartupError when one of them can't."""
        _check_port(self.config.host, self.config.port)
        split = self.config.topology == "disaggregated"
        prefill_names = [f"prefill-{index}" for index in range(self.config.num_prefill if split else 0)]
        decode_names = [f"decode-{index}" for index in range(self.config.num_decode)]
        router_names = ["router", *(f"router-{index}" for index in range(1, self.config.num_routers))]
        names = ["kvtransfer"] * split + prefill_names + decode_names + router_names
        free = list(_free_ports(2 * len(names)))
        ports = dict(zip(names, free[: len(names)], strict=True))
        if self.config.metrics:
            self.metrics_ports = {name: free.pop() for name in names if name not in router_names}
        address = {name: f"127.0.0.1:{port}" for name, port in ports.items()}

        if self.config.take_turns and len(prefill_names + decode_names) > 1 and hasattr(os, "memfd_create"):
            self._turns_fd = os.memfd_create("turns", os.MFD_CLOEXEC)
        if split:
            agent_options = {"kv-arena": self.config.kv_arena, **self.config.agent_options}
            if self.config.chaos:
                agent_options["faults"] = True
            self._spawn("kvtransfer", "kvtransfer", ports["kvtransfer"], agent_options)
        share = _share_of_gpu(self.config.worker_options, len(prefill_names + decode_names))
        for role, worker_names in (("prefill", prefill_names), ("decode", decode_names)):
            for name in worker_names:
                own = self.config.decode_options if role == "decode" else {}
                options = {
                    **self.config.worker_options,
                    **own,
                    "gpu-memory-utilization": share,
                    "worker-id": name,
                    "kv-agent": address.get("kvtransfer", ""),
                }
                self._spawn(role, name, ports[name], options)
        for name in router_names:
            self._spawn(
                "router",
                name,
                ports[name],
                {
                    **self.config.router_options,
                    "http-host": self.config.host,
                    "http-port": str(self.config.port),
                    "http-shared": len(router_names) > 1,
                    "prefill": ",".join(address[name] for name in prefill_names),
                    "decode": ",".join(address[name] for name in decode_names),
                },
            )
        self._await_ready()
        self._write_state()

    def supervise(self) -> str:
        """Start again what dies, with the same flags and port. Returns why the stack cannot go on: a child that dies
        again and again, or, with restarts off, the first that dies.
        """
        while True:
            before = [(child.pid, child.is_ready, child.restart_at) for child in self.children]
            for child in self.children:
                if (reason := self._look_after(child)) is not None:
                    return reason
            if before != [(child.pid, child.is_ready, child.restart_at) for child in self.children]:
                self._write_state()
            time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        """Router first: nothing new comes in; then the workers together; the agent last. Bounded; kills what hangs."""
        for roles in (("router",), WORKERS, ("kvtransfer",)):
            self._stop([child for child in self.children if child.role in roles])
        for child in self.children:
            child.close()
        self.children.clear()

    def _look_after(self, child: Child) -> str | None:
        """Why this child is given up, or None."""
        if child.restart_at is not None:
            if time.monotonic() >= child.restart_at:
                child.start_again()
        elif child.has_died():
            died = f"{child.name} (pid {child.pid}) died: {child.how_it_died}"
            if not self.config.restart:
                return died
            delay = child.plan_restart()
            if delay is None:
                return f"{died}, for the {MAX_DEATHS + 1}th time within {DEATHS_SECONDS:g} s"
            logger.warning("%s; it is started again in %g s", died, delay)
        elif child.is_overdue(self.config.start_seconds):
            logger.warning("%s is not ready after %g s: killed", child.name, self.config.start_seconds)
            child.process.kill()
        elif not child.is_ready:
            with contextlib.suppress(StartupError):  # it has died, which the next look sees
                if child.is_ready_now():
                    logger.info("%s is back, as pid %d", child.name, child.pid)
        return None

    def _spawn(self, role: str, name: str, port: int, options: Mapping[str, str | bool]) -> None:
        flags: dict[str, str | bool] = {
            **options,
            "lifeline-fd": str(self._lifeline_read),
            "drain-seconds": str(self.config.drain_seconds),
            "log-level": self.config.log_level,
        }
        if name in self.metrics_ports:
            flags["metrics-port"] = str(self.metrics_ports[name])
        if role != "kvtransfer" and self.config.model is not None:
            flags["model"] = self.config.model
        inherited = [self._lifeline_read]
        if role in WORKERS and self._turns_fd is not None:
            flags["turn-file"] = f"/proc/self/fd/{self._turns_fd}"
            inherited.append(self._turns_fd)
        environment = self._environment(role)
        self.children.append(
            Child(
                ChildSpec(
                    role=role, name=name, port=port, flags=flags, environment=environment, inherited_fds=inherited
                )
            )
        )

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
        waiting = {child.ready_fd: child for child in self.children}
        with selectors.DefaultSelector() as selector:
            for fd in waiting:
                selector.register(fd, selectors.EVENT_READ)
            while waiting:
                events = selector.select(timeout=max(0.0, deadline - time.monotonic()))
                if not events:
                    late = ", ".join(child.name for child in waiting.values())
                    raise StartupError(f"not ready after {self.config.start_seconds:.0f} s: {late}")
                for key, _ in events:
                    selector.unregister(key.fd)
                    waiting.pop(key.fd).is_ready_now()

    def _write_state(self) -> None:
        """For `relevo chaos`."""
        self._has_state = True
        children = tuple(
            ChildState(
                child.role,
                child.name,
                child.address,
                child.port,
                child.is_ready,
                process_id(child.pid) if child.restart_at is None else None,
            )
            for child in self.children
        )
        launcher = process_id(os.getpid())
        write_state(StackState(self.config.port, self.endpoint, self.config.chaos, launcher, children))

    def _stop(self, children: Sequence[Child]) -> None:
        for child in children:
            if not child.has_died():
                child.process.send_signal(signal.SIGTERM)
                child.process.send_signal(signal.SIGCONT)  # one that is stopped would not hear of it
        deadline = time.monotonic() + self.config.drain_seconds + STOP_MARGIN_SECONDS
        try:
            for child in children:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.process.wait(timeout=max(0.0, deadline - time.monotonic()))
        finally:  # also when a second Ctrl-C arrives while waiting
            for child in children:
                if not child.has_died():
                    child.process.kill()
                    child.process.wait()


def _share_of_gpu(worker_options: Mapping[str, str | bool], num_workers: int) -> str:
    """Each worker's, all being on the same GPU, if there is one: equal parts of what they may take together."""
    together = float(worker_options.get("gpu-memory-utilization", DEFAULT_GPU_MEMORY_UTILIZATION))
    return f"{together / num_workers:.6g}"


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
