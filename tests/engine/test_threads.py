from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from relevo.core.errors import StartupError
from relevo.engine import threads
from relevo.engine.config import EngineConfig
from relevo.engine.threads import cpu_quota, set_num_threads


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_quota_of_version_2_is_the_least_on_the_way_up(tmp_path: Path) -> None:
    root, proc = tmp_path / "cgroup", tmp_path / "proc"
    write(proc, "0::/pods/one/app\n")
    write(root / "pods/one/app/cpu.max", "max 100000\n")
    write(root / "pods/one/cpu.max", "250000 100000\n")
    write(root / "pods/cpu.max", "400000 100000\n")
    assert cpu_quota(root, proc) == 2.5


def test_quota_in_a_container_that_sees_only_its_own_group(tmp_path: Path) -> None:
    root, proc = tmp_path / "cgroup", tmp_path / "proc"
    write(proc, "0::/docker/0123\n")
    write(root / "cpu.max", "200000 100000\n")
    assert cpu_quota(root, proc) == 2.0


def test_quota_of_version_1(tmp_path: Path) -> None:
    root, proc = tmp_path / "cgroup", tmp_path / "proc"
    write(proc, "12:memory:/a\n4:cpu,cpuacct:/a\n")
    write(root / "cpu,cpuacct/a/cpu.cfs_quota_us", "50000\n")
    write(root / "cpu,cpuacct/a/cpu.cfs_period_us", "100000\n")
    write(root / "cpu,cpuacct/cpu.cfs_quota_us", "-1\n")
    write(root / "cpu,cpuacct/cpu.cfs_period_us", "100000\n")
    assert cpu_quota(root, proc) == 0.5


def test_no_quota(tmp_path: Path) -> None:
    proc = tmp_path / "proc"
    write(proc, "0::/\n")
    assert cpu_quota(tmp_path / "nothing", proc) is None
    assert cpu_quota(tmp_path, tmp_path / "not-linux") is None


@pytest.mark.parametrize(("quota", "expected"), [(None, 4), (0.5, 1), (2.0, 2), (2.5, 3), (64.0, 4)])
def test_threads_are_bounded_by_the_quota(monkeypatch: pytest.MonkeyPatch, quota: float | None, expected: int) -> None:
    torch.set_num_threads(4)
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    assert set_num_threads(None) == torch.get_num_threads() == expected


def test_a_number_that_was_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "cpu_quota", lambda: 1.0)
    assert set_num_threads(3) == torch.get_num_threads() == 3
    with pytest.raises(StartupError, match="threads must be at least 1, not 0"):
        EngineConfig(threads=0)


def test_here_no_more_threads_than_cores() -> None:
    assert 1 <= set_num_threads(None) <= len(os.sched_getaffinity(0))
