"""What `relevo serve` decides and writes down, without its processes: those are in tests/e2e and tests/faults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from relevo import chaos
from relevo import stack as stack_module
from relevo.child import MAX_BACKOFF_SECONDS, MAX_DEATHS, Backoff, ChildSpec
from relevo.core.errors import InvalidRequest, NotFound, RelevoError, StartupError, Unavailable
from relevo.stack_state import (
    ChildState,
    ProcessId,
    StackState,
    find_stack,
    is_running,
    process_id,
    remove_state,
    send_signal,
    write_state,
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / f"relevo-stacks-{os.getuid()}"


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    with process:
        yield process
        process.kill()


def stack(*children: ChildState, port: int = 8000, has_chaos: bool = True) -> StackState:
    return StackState(port, f"http://127.0.0.1:{port}", has_chaos, process_id(os.getpid()), children)


def child(process: ProcessId | None, name: str = "decode-0", role: str = "decode") -> ChildState:
    return ChildState(role, name, "127.0.0.1:1", 1, True, process)


def test_child_that_dies_now_and_then_waits_longer_each_time_up_to_a_bound() -> None:
    backoff = Backoff()
    delays = [backoff.after_death(now=100.0 * number, ready_seconds=10) for number in range(8)]
    assert delays == [0.5, 1, 2, 4, 8, MAX_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS]


def test_child_that_served_for_long_starts_again_at_once() -> None:
    backoff = Backoff()
    assert [backoff.after_death(now=1000.0 * number, ready_seconds=900) for number in range(4)] == [0.5] * 4


def test_child_that_dies_too_often_is_given_up() -> None:
    backoff = Backoff()
    assert None not in [backoff.after_death(now=float(number), ready_seconds=1) for number in range(MAX_DEATHS)]
    assert backoff.after_death(now=59.0, ready_seconds=1) is None


class SeenChild:
    """A child of a stack that is not started."""

    specs: ClassVar[dict[str, ChildSpec]] = {}

    def __init__(self, spec: ChildSpec) -> None:
        self.specs[spec.name] = spec


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"num_prefill": 1, "num_decode": 1}, "0.45"),
        ({"num_prefill": 1, "num_decode": 2, "worker_options": {"gpu-memory-utilization": "0.6"}}, "0.2"),
        ({"num_prefill": 5, "topology": "aggregated"}, "0.9"),
    ],
)
def test_workers_divide_a_gpu_equally(options: dict[str, Any], share: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack_module, "Child", SeenChild)
    monkeypatch.setattr(stack_module.Stack, "_await_ready", lambda self: None)
    monkeypatch.setattr(stack_module.Stack, "_write_state", lambda self: None)
    monkeypatch.setattr(SeenChild, "specs", {})
    with stack_module.Stack(stack_module.StackConfig(port=0, **options)) as started:
        started.start()
        started.children.clear()  # nothing of them is to be stopped
    shares = {name: spec.flags.get("gpu-memory-utilization") for name, spec in SeenChild.specs.items()}
    workers = {name for name in shares if name.startswith(("prefill", "decode"))}
    assert workers
    assert shares == {name: share if name in workers else None for name in shares}


def test_state_is_for_its_user_alone_and_comes_back_whole(folder: Path) -> None:
    state = stack(child(process_id(os.getpid())), child(None, "router", "router"))
    path = write_state(state)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600
    assert find_stack(None) == find_stack(8000) == state
    remove_state(8000)
    assert not folder.exists()
    remove_state(8000)


def test_folder_that_others_can_read_is_refused(folder: Path) -> None:
    folder.mkdir(mode=0o755)
    with pytest.raises(StartupError, match="mode 0700"):
        write_state(stack())


def test_stacks_are_named_when_one_must_be_chosen() -> None:
    with pytest.raises(NotFound, match="no stack is running"):
        find_stack(None)
    write_state(stack(port=8000))
    write_state(stack(port=8001))
    with pytest.raises(NotFound, match="--port, of 8000, 8001"):
        find_stack(None)
    with pytest.raises(NotFound, match="at port 9: there is one at 8000, 8001"):
        find_stack(9)


def test_file_of_a_launcher_that_was_killed_is_removed(folder: Path) -> None:
    """Also where another process has its pid now."""
    path = write_state(replace(stack(), launcher=ProcessId(os.getpid(), started=1)))
    with pytest.raises(NotFound):
        find_stack(None)
    assert not path.exists()


def test_file_that_is_damaged_or_of_another_version_is_passed_over(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    (folder / "1.json").write_text("{")
    (folder / "2.json").write_text(json.dumps({"children": [], "launcher": {"pid": 1, "started": 1}, "colour": 3}))
    with pytest.raises(NotFound):
        find_stack(None)


def test_signal_reaches_the_process_and_never_another_with_its_pid(sleeper: subprocess.Popen[bytes]) -> None:
    process = process_id(sleeper.pid)
    assert is_running(process)
    other = ProcessId(sleeper.pid, process.started - 1)
    assert not is_running(other)
    assert not send_signal(other, signal.SIGKILL)
    assert sleeper.poll() is None
    assert send_signal(process, signal.SIGKILL)
    assert sleeper.wait(10) == -signal.SIGKILL
    assert not send_signal(process, signal.SIGKILL)


def test_stopped_process_goes_on(sleeper: subprocess.Popen[bytes], capsys: pytest.CaptureFixture[str]) -> None:
    write_state(stack(child(process_id(sleeper.pid))))
    chaos.stop("decode-0", seconds=0.01, port=None)
    assert "decode-0 goes on" in capsys.readouterr().out
    assert Path(f"/proc/{sleeper.pid}/stat").read_text().rpartition(")")[2].split()[0] in "SR"


def test_unknown_name_lists_those_there_are() -> None:
    write_state(stack(child(None), child(None, "router", "router")))
    with pytest.raises(InvalidRequest, match="'decode-7': there are decode-0, router"):
        chaos.kill("decode-7", port=None)


def test_process_that_is_not_there_just_now_is_not_killed() -> None:
    write_state(stack(child(None), child(ProcessId(os.getpid(), 1), "prefill-0", "prefill")))
    for name in ("decode-0", "prefill-0"):
        with pytest.raises(NotFound, match=f"{name} is not running"):
            chaos.kill(name, port=None)


@pytest.mark.parametrize(
    ("state", "complaint"),
    [
        (stack(child(None, "kvtransfer", "kvtransfer"), has_chaos=False), "was started without --chaos"),
        (stack(child(None)), "is aggregated: it has no KV agent"),
    ],
)
def test_stack_whose_agent_cannot_be_made_to_fail_says_so(state: StackState, complaint: str) -> None:
    write_state(state)
    for verb in (chaos.delay, chaos.drop, chaos.cut, chaos.corrupt, chaos.clear):
        with pytest.raises(Unavailable, match=complaint):
            verb(port=None)


def test_errors_are_one_line(folder: Path) -> None:
    command = [sys.executable, "-m", "relevo.cli", "chaos", "kill", "decode-0"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 1
    assert result.stderr == "relevo: error: no stack is running here: `relevo serve --chaos` starts one\n"
    assert issubclass(NotFound, RelevoError)
