"""How many threads compute: the cores that this process may really use."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

CGROUP_ROOT = Path("/sys/fs/cgroup")


def set_num_threads(wanted: int | None) -> int:
    """Size torch's pool, which matrix products and our kernels share; returns its size.

    wanted: None leaves torch's own choice (OMP_NUM_THREADS, else the cores in this process's affinity), bounded by the
        CPU quota of its cgroup: under `docker run --cpus 2` on 64 cores, 64 threads would wait for one another's slices
    """
    quota = cpu_quota()
    chosen = torch.get_num_threads()
    if wanted is not None:
        chosen = wanted
    elif quota is not None:
        chosen = max(1, min(chosen, math.ceil(quota)))
    if chosen != torch.get_num_threads():
        torch.set_num_threads(chosen)
    logger.debug("%d threads (CPU quota: %s)", chosen, "none" if quota is None else f"{quota:g} cores")
    return chosen


def cpu_quota(root: Path = CGROUP_ROOT, proc: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores' worth of time that the cgroup grants, the least of it and those above it; None if nothing is limited."""
    return min(_quotas(root, proc), default=None)


def _quotas(root: Path, proc: Path) -> Iterator[float]:
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return  # not Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        version_2 = controllers == ""
        if not version_2 and "cpu" not in controllers.split(","):
            continue
        top = root if version_2 else root / controllers
        # In a container the path may be the host's: then only the top is there, and it is the container's own.
        folder = top / path.strip("/")
        for group in (folder, *folder.parents):
            yield from _quota_v2(group / "cpu.max") if version_2 else _quota_v1(group)
            if group == top:
                break


def _quota_v2(path: Path) -> Iterator[float]:
    """https://docs.kernel.org/admin-guide/cgroup-v2.html#cpu-interface-files: "$MAX $PERIOD" in µs, or "max …"."""
    try:
        maximum, period = path.read_text().split()
    except (OSError, ValueError):
        return
    if maximum != "max":
        yield int(maximum) / int(period)


def _quota_v1(group: Path) -> Iterator[float]:
    """https://docs.kernel.org/scheduler/sched-bwc.html: µs a period; -1 is no limit."""
    try:
        quota, period = (int((group / name).read_text()) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
    except (OSError, ValueError):
        return
    if quota > 0:
        yield quota / period
