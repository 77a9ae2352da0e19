"""A command in a terminal of its own (a pty), typed into and read from."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

CTRL_C, CTRL_D = "\x03", "\x04"
SECONDS = 30.0

# A session's leader that opens a terminal gets it as its own: Ctrl-C goes to it.
_RUN = "import os; os.open(os.ttyname(0), os.O_RDWR); from relevo.cli import main; main()"
_SEQUENCES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]|\r")


class Terminal:
    def __init__(self, process: subprocess.Popen[bytes], fd: int) -> None:
        self.process = process
        self._fd = fd
        self._raw = b""
        self._seen = 0

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def expect(self, text: str) -> str:
        """Wait for it; what came since the last that was expected, up to its end."""
        deadline = time.monotonic() + SECONDS
        while (found := self.shown.find(text, self._seen)) < 0:
            if not self._read(deadline - time.monotonic()):
                raise AssertionError(f"{text!r} did not come: {self.shown[self._seen :]!r}")
        before, self._seen = self._seen, found + len(text)
        return self.shown[before : self._seen]

    def end(self) -> tuple[int, str]:
        """Wait for its end: exit code, and what came since the last that was expected."""
        deadline = time.monotonic() + SECONDS
        while self._read(deadline - time.monotonic()):
            pass
        return self.process.wait(max(0.1, deadline - time.monotonic())), self.shown[self._seen :]

    @property
    def shown(self) -> str:
        """Without colours and carriage returns."""
        return _SEQUENCES.sub(b"", self._raw).decode(errors="replace")

    def _read(self, seconds: float) -> bool:
        """False: nothing more will come, or not in time."""
        if seconds <= 0 or not select.select([self._fd], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # EIO: the other end is closed
            return False
        self._raw += data
        return bool(data)


@contextmanager
def terminal(*arguments: str, **environment: str) -> Iterator[Terminal]:
    """relevo ARGUMENTS"""
    ours, theirs = pty.openpty()
    variables: Mapping[str, str] = {**os.environ, "TERM": "xterm", **environment}
    command = [sys.executable, "-c", _RUN, *arguments]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=variables, start_new_session=True
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
