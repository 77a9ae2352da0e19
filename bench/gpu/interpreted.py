"""Checks of Triton's kernels in its interpreter, small; prints them as JSON: `TRITON_INTERPRET=1` must be set."""

from __future__ import annotations

import json
import sys
from dataclasses import astuple

import torch

from bench.gpu.checks import run_checks
from relevo.kernels import load_backend
from tests.support import triton_interpreter


def main() -> None:
    torch.set_num_threads(1)
    triton_interpreter.mend()
    checks = run_checks(load_backend("triton", "cpu"), "triton, interpreted", torch.device("cpu"), tiny=True)
    json.dump([astuple(check) for check in checks], sys.stdout)


if __name__ == "__main__":
    main()
