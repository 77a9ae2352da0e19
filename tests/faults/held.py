"""What this process has open."""

from __future__ import annotations

import gc
import os
import threading
from collections import Counter
from dataclasses import dataclass

_STAY = ("asyncio_", "copier_", "tqdm_")


@dataclass
class Held:
    """Threads are Python's, by name, without pools, which only grow, and progress bars."""

    num_fds: int
    threads: Counter[str]

    def is_within(self, other: Held) -> bool:
        """Nothing here that was not there."""
        return self.num_fds <= other.num_fds and self.threads <= other.threads


def held() -> Held:
    gc.unfreeze()  # a worker that has loaded freezes all there is, which is wise in a process of its own
    gc.collect()
    names = [
        thread.name for thread in threading.enumerate() if not thread.name.startswith(("asyncio_", "copier_", "tqdm_"))
    ]
    return Held(len(os.listdir("/proc/self/fd")), Counter(names))  # noqa: PTH208  # counted, no more
