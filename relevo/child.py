"""One process of a local stack: started with its flags, ready when it says so, and started again the same way."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from relevo.core.errors import StartupError

MAX_DEATHS = 5  # within DEATHS_SECONDS: with one more it is given up
DEATHS_SECONDS = 60.0
MIN_BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class ChildSpec:
    """flags: of `python -m services.ROLE`. inherited_fds: file descriptors that those name."""

    role: str
    name: str
    port: int
    flags: Mapping[str, str | bool]
    environment: Mapping[str, str]
    inherited_fds: Sequence[int]


class Child:
    """Belongs to one thread. Its process may be running, or dead and waiting to be started again."""

    def __init__(self, spec: ChildSpec) -> None:
        self.role, self.name, self.port = spec.role, spec.name, spec.port
        self.address = f"127.0.0.1:{spec.port}"
        self.is_ready = False
        self.restart_at: float | None = None  # on the monotonic clock; None: not dead, or not noticed yet
        self._spec = spec
        self._backoff = Backoff()
        self._since = 0.0  # when it was started, or got ready
        self._ready_fd: int | None = None
        self.process = self._start()

    @property
    def pid(self) -> int:
        """Of the process that runs, or ran last."""
        return self.process.pid

    @property
    def ready_fd(self) -> int:
        """Readable when is_ready_now() has news."""
        assert self._ready_fd is not None
        return self._ready_fd

    @property
    def how_it_died(self) -> str:
        code = self.process.returncode
        return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"

    def start_again(self) -> None:
        self.close()
        self.restart_at = None
        self.process = self._start()

    def is_ready_now(self) -> bool:
        """True once, when its ready line is there. Raises StartupError if it ended without one, and has said why."""
        assert self._ready_fd is not None
        if self.is_ready or not select.select([self._ready_fd], [], [], 0)[0]:
            return False
        line = b""
        while not line.endswith(b"\n") and (part := os.read(self._ready_fd, 4096)):
            line += part
        self.close()
        if not line.endswith(b"\n"):
            code = self.process.wait(timeout=30)
            raise StartupError(f"{self.name} could not start (exit code {code}); its reason stands above")
        json.loads(line)
        self.is_ready = True
        self._since = time.monotonic()
        return True

    def has_died(self) -> bool:
        return self.process.poll() is not None

    def is_overdue(self, start_seconds: float) -> bool:
        """It should have been ready by now."""
        return not self.is_ready and time.monotonic() - self._since > start_seconds

    def plan_restart(self) -> float | None:
        """It has died: in how many seconds it is started again. None: it does so too often."""
        now = time.monotonic()
        delay = self._backoff.after_death(now, now - self._since if self.is_ready else 0.0)
        self.is_ready = False
        self.restart_at = None if delay is None else now + delay
        return delay

    def close(self) -> None:
        """Forget the pipe. Twice is harmless."""
        if self._ready_fd is not None:
            fd, self._ready_fd = self._ready_fd, None
            os.close(fd)

    def _start(self) -> subprocess.Popen[bytes]:
        ready_read, ready_write = os.pipe()
        flags = {**self._spec.flags, "port": str(self.port), "ready-fd": str(ready_write)}
        command = [sys.executable, "-m", f"services.{self.role}"]
        command += [_argument(flag, value) for flag, value in flags.items() if value != ""]
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=[ready_write, *self._spec.inherited_fds],
                # Out of the terminal's process group: Ctrl-C reaches the launcher alone, which stops them in order.
                start_new_session=True,
                env=self._spec.environment,
            )
        except BaseException:
            os.close(ready_read)
            raise
        finally:
            os.close(ready_write)
        self._ready_fd = ready_read
        self._since = time.monotonic()
        return process


class Backoff:
    """How long a child that died waits. Knows no clock: times are its caller's, in seconds."""

    def __init__(self) -> None:
        self._deaths: deque[float] = deque()
        self._seconds = MIN_BACKOFF_SECONDS

    def after_death(self, now: float, ready_seconds: float) -> float | None:
        """ready_seconds: how long it had served before. None: more than MAX_DEATHS within DEATHS_SECONDS."""
        while self._deaths and now - self._deaths[0] > DEATHS_SECONDS:
            self._deaths.popleft()
        self._deaths.append(now)
        if len(self._deaths) > MAX_DEATHS:
            return None
        if ready_seconds > DEATHS_SECONDS:
            self._seconds = MIN_BACKOFF_SECONDS
        seconds, self._seconds = self._seconds, min(2 * self._seconds, MAX_BACKOFF_SECONDS)
        return seconds


def _argument(flag: str, value: str | bool) -> str:
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag}={value}"
