"""Run everything and print one table: `python -m bench.gpu`.

Status 0: every correctness check passed; 1: one failed; 2: it could not begin.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from bench.gpu.clock import Deadline
from bench.gpu.parts import Bench, Part, run_part
from bench.gpu.plan import TOTAL_SECONDS, make_plan
from bench.gpu.plots import write_plots
from bench.gpu.report import describe, make_report, print_report, write_json
from relevo.kernels import BACKENDS

HANGING_SECONDS = 10.0  # beyond the end, before the table is printed in spite of a part that does not let go


def main() -> int:
    arguments = _parse()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("torch finds no CUDA device; `--device cpu --tiny` shows that everything runs", file=sys.stderr)
        return 2
    for library in ("transformers", "relevo"):
        logging.getLogger(library).setLevel(logging.ERROR)
    if arguments.tiny:
        torch.set_num_threads(1)  # with tensors this small, threads only wait for each other
    device = torch.device(arguments.device)
    started = time.monotonic()
    total = Deadline(arguments.seconds)
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    plan, about = make_plan(), describe(device, arguments.backend)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(device, arguments.backend, arguments.tiny, Path(scratch))

        def end() -> int:
            return finish(bench, plan, about, folder, time.monotonic() - started)

        hanging = threading.Timer(arguments.seconds + HANGING_SECONDS, lambda: _leave(end()))
        hanging.daemon = True
        hanging.start()
        for part in plan:
            print(f"[{time.monotonic() - started:4.0f} s] {part.name}", file=sys.stderr, flush=True)
            run_part(part, bench, total)
        hanging.cancel()
        return end()


def finish(bench: Bench, plan: list[Part], about: dict[str, str], folder: Path, seconds: float) -> int:
    """Files first, the table last."""
    report: dict[str, Any] = make_report(bench, plan, about, seconds)
    write_json(report, folder / "gpu.json")
    plots = _plots(report, folder)
    print(f"written: {folder / 'gpu.json'}; {plots}")
    print_report(report)
    return 1 if any(check.ok is False for check in bench.checks) else 0


def _plots(report: dict[str, Any], folder: Path) -> str:
    try:
        paths = write_plots(report, folder)
    except Exception as error:  # the figures are worth more than their plots
        return f"no plots: {type(error).__name__}: {error}"
    return ", ".join(str(path) for path in paths) if paths else "no plots: matplotlib is not installed"


def _leave(status: int) -> None:
    """Whatever threads still hang, of ours or of a library."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes: whether everything runs, in seconds")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="kernels")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for all parts together")
    parser.add_argument("--output", default="bench-gpu", help="folder for JSON and plots")
    return parser.parse_args()


if __name__ == "__main__":
    _leave(main())
