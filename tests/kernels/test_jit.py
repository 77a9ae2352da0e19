"""What is compiled stays on disk, and a start that compiles says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CODE = """
import logging
from relevo.kernels.cpu import activation, store
from relevo.kernels.cpu.jit import announced
logging.basicConfig()
with announced():
    activation.compile()
    store.check_slots(0, 0, 1)
"""


def start(cache: Path) -> str:
    """What a process that needs two kernels, one of each kind of entry point, writes to its log."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", CODE]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stderr


def test_only_the_first_start_compiles_and_says_so(tmp_path: Path) -> None:
    assert start(tmp_path).count("compiling the CPU kernels") == 1
    assert start(tmp_path) == ""
