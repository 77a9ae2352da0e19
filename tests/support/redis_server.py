"""A Redis of the test's own: in a container where Docker runs (testcontainers), else a local redis-server.

Where there is neither, or no client, the test is skipped and says so.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.support.containers import has_image

IMAGE = "redis:7"


class Runner(Protocol):
    """Runs redis-server on a port of 127.0.0.1. start() after stop(): again, with nothing of what it had."""

    def start(self, port: int, options: list[str]) -> None: ...
    def stop(self) -> None: ...
    def freeze(self) -> None: ...
    def thaw(self) -> None: ...


class RedisServer:
    """client: redis.Redis: its types leave open what is awaitable"""

    def __init__(self, runner: Runner, password: str = "") -> None:
        import redis

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._runner = runner
        self._password = password
        self.client: Any = redis.Redis(port=self.port, password=password or None)

    @property
    def url(self) -> str:
        secret = f":{self._password}@" if self._password else ""
        return f"redis://{secret}127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Again: with nothing of what it had."""
        import redis

        secret = ["--requirepass", self._password] if self._password else []
        self._runner.start(self.port, ["--save", "", "--appendonly", "no", *secret])
        deadline = time.monotonic() + 10
        while True:
            try:
                self.client.ping()
                return
            except (redis.ConnectionError, redis.BusyLoadingError):
                assert time.monotonic() < deadline
                time.sleep(0.02)

    def stop(self) -> None:
        self._runner.stop()

    def freeze(self) -> None:
        """It keeps its connections and says nothing, until it is thawed."""
        self._runner.freeze()

    def thaw(self) -> None:
        self._runner.thaw()


@contextmanager
def running_redis(folder: Path, password: str = "") -> Iterator[RedisServer]:
    pytest.importorskip("redis", reason="the extra relevo[redis] is not installed")
    server = RedisServer(_make_runner(folder), password)
    try:
        server.start()
        yield server
    finally:
        server.client.close()
        server.stop()


@cache
def _in_container() -> bool:
    return has_image(IMAGE)


def _make_runner(folder: Path) -> Runner:
    if _in_container():
        return _Container()
    if shutil.which("redis-server") is None:
        pytest.skip(f"neither {IMAGE} in Docker nor redis-server is there: apt-get install redis-server")
    return _Local(folder)


class _Container:
    def __init__(self) -> None:
        # No second container that looks after the first: stop() is called however the test ends.
        os.environ.setdefault("TESTCONTAINERS_RYUK_DISABLED", "true")
        self._container: Any = None

    def start(self, port: int, options: list[str]) -> None:
        from testcontainers.core.container import DockerContainer

        flags = ["--bind", "127.0.0.1", *options]
        # The host's network: tests say 127.0.0.1, and Docker's proxy would answer for a Redis that is gone.
        container = DockerContainer(IMAGE, network_mode="host")
        self._container = container.with_command(["redis-server", "--port", str(port), *flags])
        self._container.start()

    def stop(self) -> None:
        if self._container is not None:
            self._container.stop(force=True)
            self._container.get_docker_client().client.close()
            self._container = None

    def freeze(self) -> None:
        self._container.get_wrapped_container().pause()

    def thaw(self) -> None:
        self._container.get_wrapped_container().unpause()


class _Local:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, port: int, options: list[str]) -> None:
        flags = ["--bind", "127.0.0.1", "--dir", str(self._folder), *options]
        self._process = subprocess.Popen(["redis-server", "--port", str(port), *flags], stdout=subprocess.DEVNULL)

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()
            self._process.wait(10)
            self._process = None

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)
