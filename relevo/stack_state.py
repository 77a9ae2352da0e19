"""What runs on this machine: a file for each `relevo serve`, by which others find its processes.

    DIR/relevo-stacks-UID/PORT.json        DIR: XDG_RUNTIME_DIR, or the directory for temporary files

The folder has mode 0700, the file 0600. A process is named by its pid and the time of its start: another one that has
got the pid since then is never taken for it.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from relevo.core.errors import NotFound, StartupError


@dataclass(frozen=True)
class ProcessId:
    """started: clock ticks since the machine's start, 0 where the system does not tell."""

    pid: int
    started: int


@dataclass(frozen=True)
class ChildState:
    """process: None while it waits to be started again."""

    role: str
    name: str
    address: str
    port: int
    is_ready: bool
    process: ProcessId | None


@dataclass(frozen=True)
class StackState:
    """port: of the HTTP endpoint. has_chaos: started with --chaos."""

    port: int
    endpoint: str
    has_chaos: bool
    launcher: ProcessId
    children: tuple[ChildState, ...]


def process_id(pid: int) -> ProcessId:
    return ProcessId(pid, _start_time(pid) or 0)


def write_state(state: StackState) -> Path:
    """Replace the stack's file, all at once. Raises StartupError if the folder is not ours alone."""
    folder = _folder()
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise StartupError(f"{folder} must be a directory of user {os.getuid()} with mode 0700: remove it")
        path = folder / f"{state.port}.json"
        fd, temporary = tempfile.mkstemp(dir=folder)  # mode 0600
        with os.fdopen(fd, "w") as file:
            json.dump(asdict(state), file)
        Path(temporary).rename(path)
    except OSError as error:
        raise StartupError(f"cannot write to {folder}: {error.strerror}") from error
    return path


def remove_state(port: int) -> None:
    """Removing what is not there is harmless."""
    path = _folder() / f"{port}.json"
    path.unlink(missing_ok=True)
    with suppress(OSError):  # other stacks' files are in there, or it never was
        path.parent.rmdir()


def find_stack(port: int | None) -> StackState:
    """The stack whose HTTP port this is; None: the only one. Raises NotFound saying which there are."""
    stacks = _running_stacks()
    ports = ", ".join(str(stack.port) for stack in stacks)
    if not stacks:
        raise NotFound("no stack is running here: `relevo serve --chaos` starts one")
    if port is None and len(stacks) > 1:
        raise NotFound(f"several stacks are running: choose one with --port, of {ports}")
    for stack in stacks:
        if port in (None, stack.port):
            return stack
    raise NotFound(f"no stack is running at port {port}: there is one at {ports}")


def send_signal(process: ProcessId, number: signal.Signals) -> bool:
    """False if that process is gone. Another process is never reached, whatever its pid."""
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        if not is_running(process):
            return False
        signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)
    return True


def is_running(process: ProcessId) -> bool:
    return process.started != 0 and _start_time(process.pid) == process.started


def _folder() -> Path:
    return Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"relevo-stacks-{os.getuid()}"


def _running_stacks() -> list[StackState]:
    """By port. Files of launchers that were killed are removed."""
    stacks = []
    for path in sorted(_folder().glob("*.json")):
        try:
            stack = _parse(path.read_text())
        except (OSError, ValueError, TypeError, KeyError):
            continue  # it ended just now, or is of another version
        if is_running(stack.launcher):
            stacks.append(stack)
        else:
            path.unlink(missing_ok=True)
    return sorted(stacks, key=lambda stack: stack.port)


def _parse(text: str) -> StackState:
    values = json.loads(text)
    children = []
    for child in values.pop("children"):
        process = child.pop("process")
        children.append(ChildState(**child, process=ProcessId(**process) if process is not None else None))
    launcher = ProcessId(**values.pop("launcher"))
    return StackState(**values, launcher=launcher, children=tuple(children))


def _start_time(pid: int) -> int | None:
    """None: there is no such process (any more), or the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = fields.rpartition(")")[2]  # after the command's name, which may hold anything; the state comes first
    state, started = fields.split()[0], int(fields.split()[19])
    return None if state in "ZX" else started
