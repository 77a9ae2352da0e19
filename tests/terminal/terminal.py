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
AGAIN_SECONDS = 2.0

# A session's leader that opens a terminal gets it as its own: Ctrl-C goes to it.
_RUN = "import os; os.open(os.ttyname(0), os.O_RDWR); from relevo.cli import main; main()"
_SEQUENCES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]|\r")


class Terminal:
    def __init__(self, process: subprocess.Popen[bytes], fd: int) -> None:
        self.process = process
        self._fd = fd
        self._raw = b""
        self._seen = 0
        self._is_closed = False

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def expect(self, text: str, again: str = "") -> str:
        """Wait for it; what came since the last that was expected, up to its end.

        again: typed as long as nothing comes. A signal that arrives after the prompt was printed and before readline
        waits for a key is noticed with the next key only; a person would press Ctrl-C once more.
        """
        deadline = time.monotonic() + SECONDS
        while (found := self.shown.find(text, self._seen)) < 0:
            if self._read(min(deadline - time.monotonic(), AGAIN_SECONDS if again else SECONDS)):
                continue
            if not again or time.monotonic() > deadline:
                raise AssertionError(f"{text!r} did not come: {self.shown[self._seen :]!r}")
            self.type(again)
        before, self._seen = self._seen, found + len(text)
        return self.shown[before : self._seen]

    def end(self, again: str = "") -> tuple[int, str]:
        """Wait for its end: exit code, and what came since the last that was expected. again: as in expect."""
        deadline = time.monotonic() + SECONDS
        while not self._is_closed and time.monotonic() < deadline:
            if not self._read(AGAIN_SECONDS) and again and not self._is_closed:
                self.type(again)
        return self.process.wait(10), self.shown[self._seen :]

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
            self._is_closed = True
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
