"""Agent and workers in containers of their own, which share a tmpfs volume and nothing else."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator

import pytest

from tests.support.containers import USER, Containers, containers, docker, run_command, why_not

pytestmark = [pytest.mark.docker, pytest.mark.timeout(120)]

TOKEN = "a token for containers on one network"
ARENA_BYTES = 1 << 20
OPEN = "import sys; open(sys.argv[1], 'rb')"


@pytest.fixture(scope="module", autouse=True)
def engine_is_there() -> None:
    if reason := why_not():
        pytest.skip(f"no containers: {reason}")


@pytest.fixture
def fleet() -> Iterator[Containers]:
    with containers(2 * ARENA_BYTES) as fleet:
        yield fleet


def line_of(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().decode().strip()


def start_agent(fleet: Containers) -> tuple[subprocess.Popen[bytes], str]:
    """Ready, with its address."""
    flags = ("--host", "0.0.0.0", "--advertise-host", fleet.address("agent"), "--port", "50051", "--ready-fd", "1")
    more = ("--arena-dir", "/arena", "--kv-arena", str(ARENA_BYTES), "--transports", "tcp", "--drain-seconds", "0.5")
    agent = fleet.start("agent", "-m", "services.kvtransfer", *flags, *more, RELEVO_KV_TOKEN=TOKEN)
    line = line_of(agent)
    assert line, "the agent did not start: its log says why"
    return agent, json.loads(line)["address"]


def test_containers_hand_blocks_over_through_a_shared_tmpfs(fleet: Containers) -> None:
    agent, address = start_agent(fleet)
    worker = ("-m", "tests.kvtransfer.worker")
    writer = fleet.start("writer", *worker, "publish", address, "a", "b", "last", RELEVO_KV_TOKEN=TOKEN)
    assert line_of(writer) == "published"
    reader = fleet.start("reader", *worker, "fetch", address, "a", "b", RELEVO_KV_TOKEN=TOKEN)
    assert line_of(reader) == "good 2"

    name = fleet.address("agent")
    [arena] = docker("exec", name, "find", "/arena", "-name", "*.arena").splitlines()
    assert docker("exec", name, "stat", "-c", "%a %u", arena) == f"600 {USER}"
    stranger = ("docker", "exec", "--user", str(USER + 1), name, "python", "-c", OPEN, arena)
    refused = subprocess.run(stranger, capture_output=True, text=True, timeout=30, check=False)
    assert "PermissionError" in refused.stderr

    nobody = fleet.start("nobody", *worker, "fetch", address, "a")
    assert line_of(nobody) == ""
    assert nobody.wait(20) == 1, "it has no token"
    docker("stop", "-t", "10", name)
    assert agent.wait(20) == 0
    assert not docker("exec", fleet.address("reader"), "find", "/arena", "-name", "*.arena")


def test_dockers_small_dev_shm_is_an_error_that_names_the_fix() -> None:
    """64 MiB unless told otherwise. Memory that is not there must not be found out by a bus error."""
    command = ["docker", *run_command(["-m", "services.kvtransfer", "--port", "0", "--kv-arena", "256MiB"])]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("relevo-kvtransfer: error: --kv-arena 256MiB does not fit into /dev/shm")
    assert "--shm-size" in line


def test_workers_copy_works_for_a_user_who_may_write_nowhere() -> None:
    code = "import numba; from relevo.kernels.checked_copy import check; assert check()"
    command = ["docker", *run_command(["-c", code], ["--read-only", "--user", f"{USER}:{USER}"])]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stderr


def test_larger_dev_shm_is_enough() -> None:
    code = "from services.kvtransfer.arena import Arena; from pathlib import Path; Arena(Path('/dev/shm'), 96 << 20)"
    command = ["docker", *run_command(["-c", code], ["--shm-size", "128m"])]
    assert subprocess.run(command, timeout=60, check=False, stdin=subprocess.DEVNULL).returncode == 0
