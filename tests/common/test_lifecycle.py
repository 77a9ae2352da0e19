"""A process's life, from outside."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

from services.common.discovery import StaticDiscovery


def start(*flags: str) -> subprocess.Popen[str]:
    """The service of tests/common/service.py: readiness goes to stdout, the lifeline is stdin."""
    command = [sys.executable, "-m", "tests.common.service", "--ready-fd", "1", *flags]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and stderr."""
    _, stderr = process.communicate(timeout=15)
    return process.returncode, stderr


def test_ready_line_then_sigterm_shuts_down_backwards() -> None:
    process = start()
    ready = json.loads(first_line(process))
    assert ready["role"] == "example"
    assert ready["id"] == "example-0"
    assert ready["pid"] == process.pid
    assert ready["address"].startswith("127.0.0.1:")
    process.send_signal(signal.SIGTERM)
    code, stderr = end_of(process)
    assert code == 0
    assert stderr.index("SIGTERM") < stderr.index("last in, first out") < stderr.index("first in, last out")


def test_end_of_the_lifeline_shuts_down() -> None:
    process = start("--lifeline-fd", "0")
    first_line(process)
    code, stderr = end_of(process)  # closes its stdin
    assert code == 0
    assert "the launcher is gone" in stderr


def test_sigint_during_start_cancels_it() -> None:
    process = start("--act", "slow-start")
    assert first_line(process) == "starting\n"
    process.send_signal(signal.SIGINT)
    code, stderr = end_of(process)
    assert code == 0
    assert "first in, last out" in stderr


def test_crash_in_the_background_takes_the_process_down() -> None:
    code, stderr = end_of(start("--act", "crash"))
    assert code == 1
    assert "background task 'crasher' died" in stderr
    assert "KeyError: 'gone'" in stderr
    assert "first in, last out" in stderr


def test_refused_start_is_one_line_after_the_log() -> None:
    code, stderr = end_of(start("--act", "refuse"))
    assert code == 1
    assert stderr.splitlines()[-1] == "relevo-example: error: this will not do"
    assert "Traceback" not in stderr


def test_bad_flag_is_the_whole_output() -> None:
    code, stderr = end_of(start("--port", "x"))
    assert code == 1
    [line] = stderr.splitlines()
    assert line.startswith(
        "relevo-example: error: --port (or RELEVO_PORT): 'x' is not valid: should be a valid integer"
    )


def test_shutdown_that_gets_stuck_is_forced() -> None:
    process = start("--act", "stuck-thread", "--drain-seconds", "0")
    first_line(process)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, stderr = end_of(process)
    assert code == 1
    assert "exiting by force" in stderr
    assert time.monotonic() - began < 10


async def test_static_discovery_yields_its_addresses_once() -> None:
    discovery = StaticDiscovery({"decode": ["a:1", "b:2"]})
    assert [members async for members in discovery.watch("decode")] == [{"a:1": "", "b:2": ""}]
    assert [members async for members in discovery.watch("prefill")] == [{}]
