"""A process's life: settings, logs, start-up, readiness, signals, and a shutdown that runs backwards within a bound.

A service is one coroutine that starts things and returns:

    async def serve(settings: MySettings, process: Process) -> None:
        server = make_server([...], settings.host, settings.port)
        await server.start()
        process.stack.push_async_callback(server.stop, settings.drain_seconds)   # runs at shutdown, last first
        process.spawn(watch_things(), "watcher")                                 # if it crashes, so does the process
        process.ready(address=server.address)

    def main() -> None:
        sys.exit(run_service("router", MySettings, serve))
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import threading
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any, TypeVar

import uvloop

from relevo.core.errors import StartupError
from services.common.config import ServiceSettings, parse_settings
from services.common.telemetry import configure_logging

logger = logging.getLogger(__name__)

_SHUTDOWN_MARGIN_SECONDS = 5.0  # beyond drain_seconds; then the process ends by force

S = TypeVar("S", bound=ServiceSettings)


class Process:
    """What `serve` gets: where to register what must end, and whom to tell."""

    def __init__(self, role: str, settings: ServiceSettings, stack: AsyncExitStack) -> None:
        self.role = role
        self.incarnation = uuid.uuid4().hex
        self.stack = stack
        self.stopping = asyncio.Event()  # set at the first signal, end of the lifeline or failure
        self.failure: BaseException | None = None
        self._ready_fd = settings.ready_fd

    def spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run in the background until shutdown, where it is cancelled and awaited in its place in the stack.

        If it raises, the process goes down with exit code 1. If it returns, that is fine.
        """
        task = asyncio.create_task(coroutine, name=name)
        task.add_done_callback(self._task_done)
        self.stack.push_async_callback(_end, task)
        return task

    def fail(self, error: BaseException) -> None:
        """Take the process down with exit code 1: something it cannot live without has died. From the loop's thread."""
        if self.failure is None:
            self.failure = error
        self.stopping.set()

    def ready(self, *, address: str, id: str = "", http: str | None = None) -> None:
        """Everything works: tell the launcher (--ready-fd) and the log. address: of gRPC; http: of the HTTP door."""
        line = {"role": self.role, "id": id or self.role, "address": address, "pid": os.getpid()}
        if http is not None:
            line["http"] = http
        logger.info("ready: gRPC on %s%s", address, f", HTTP on {http}" if http else "")
        if self._ready_fd is not None:
            fd, self._ready_fd = self._ready_fd, None
            try:
                os.write(fd, (json.dumps(line) + "\n").encode())
                os.close(fd)
            except OSError as error:
                raise StartupError(f"--ready-fd {fd}: cannot be written to: {error.strerror}") from error

    def _task_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("background task %r died", task.get_name())
            self.fail(error)


def run_service(
    role: str,
    settings_class: type[S],
    serve: Callable[[S, Process], Awaitable[None]],
    argv: Sequence[str] | None = None,
) -> int:
    """Run a service until SIGTERM, SIGINT, the end of its lifeline, or a failure; returns the exit code.

    0: asked to stop. 1: could not start (one line on stderr), or something died (a traceback in the log).
    """
    try:
        settings = parse_settings(settings_class, argv)
    except StartupError as error:
        return _refuse(role, error)
    configure_logging(role, settings.log_level)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(role, settings, serve))


async def _run(role: str, settings: S, serve: Callable[[S, Process], Awaitable[None]]) -> int:
    stack = AsyncExitStack()
    process = Process(role, settings, stack)
    try:
        _watch_signals(process)
        if settings.lifeline_fd is not None:
            _watch_lifeline(process, settings.lifeline_fd)
        await _until_stopping(process, serve(settings, process))
    except Exception as error:  # answered below: one line for StartupError, a traceback for the rest
        process.fail(error)
    # Stays armed until the end: a thread that never returns must not keep the interpreter from exiting.
    _start_watchdog(settings.drain_seconds + _SHUTDOWN_MARGIN_SECONDS)
    try:
        await stack.aclose()
    except Exception as error:
        logger.exception("shutdown failed")
        process.fail(error)
    return _report(process)


async def _until_stopping(process: Process, serving: Awaitable[None]) -> None:
    """Start up, then wait; a request to stop during start-up cancels it."""
    start = asyncio.ensure_future(serving)
    stop = asyncio.create_task(process.stopping.wait())
    try:
        await asyncio.wait((start, stop), return_when=asyncio.FIRST_COMPLETED)
        if start.done():
            start.result()
            await stop
    finally:
        await _end(stop)
        await _end(start)


async def _end(task: asyncio.Future[Any]) -> None:
    """Cancel and wait. What it raised was reported when it did."""
    task.cancel()
    await asyncio.wait((task,))
    if not task.cancelled():
        task.exception()  # mark it as seen


def _watch_signals(process: Process) -> None:
    def stop(name: str) -> None:
        # Again: a launcher's SIGTERM after the terminal's SIGINT, nothing new.
        if not process.stopping.is_set():
            logger.info("%s: shutting down", name)
            process.stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number.name)


def _watch_lifeline(process: Process, fd: int) -> None:
    loop = asyncio.get_running_loop()

    def readable() -> None:
        with suppress(BlockingIOError):
            if os.read(fd, 4096):
                return
            loop.remove_reader(fd)
            if not process.stopping.is_set():
                logger.info("the launcher is gone: shutting down")
                process.stopping.set()

    try:
        os.set_blocking(fd, False)
        loop.add_reader(fd, readable)
    except OSError as error:
        raise StartupError(f"--lifeline-fd {fd} is not an open pipe: {error.strerror}") from error


def _start_watchdog(seconds: float) -> None:
    def kill() -> None:
        logger.error("shutdown did not end within %.0f s: exiting by force", seconds)
        os._exit(1)

    watchdog = threading.Timer(seconds, kill)
    watchdog.daemon = True
    watchdog.start()


def _report(process: Process) -> int:
    if process.failure is None:
        logger.info("stopped")
        return 0
    if isinstance(process.failure, StartupError):
        return _refuse(process.role, process.failure)
    logger.error("stopped by a failure", exc_info=process.failure)
    return 1


def _refuse(role: str, error: StartupError) -> int:
    print(f"relevo-{role}: error: {' '.join(error.message.split())}", file=sys.stderr, flush=True)
    return 1
