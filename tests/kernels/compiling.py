"""Kernels compiled for a Hopper GPU (sm_90) where there is none: what host code launches is compiled, not launched.

A test names a function that calls the host code, on CPU tensors, in any way that it would be called on a GPU:

    def launches() -> None:
        triton.store_kv(key, value, k_cache, v_cache, slot_mapping)

    def test_they_compile() -> None:
        for kernel in compile_launches("tests.kernels.test_store_kv:launches"):
            assert kernel.fits

It runs in a process of its own, since Triton decides between compiler and interpreter when kernels are defined. The
signatures, constants and alignments are those of the launch, and so is what the compiler makes of them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

MAX_SHARED_BYTES = 227 << 10  # of a block of threads on Hopper
MAX_REGISTERS = 1 << 16  # of all its threads


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """A kernel as one launch wants it, compiled.

    registers: of a thread
    stack_bytes: of a thread; what doesn't fit in registers is spilled there
    """

    name: str
    num_warps: int
    num_stages: int
    registers: int
    stack_bytes: int
    shared_bytes: int

    @property
    def fits(self) -> bool:
        """It spills nothing, and a multiprocessor can hold it."""
        return (
            self.stack_bytes == 0
            and self.shared_bytes <= MAX_SHARED_BYTES
            and self.registers * 32 * self.num_warps <= MAX_REGISTERS
        )


def compile_launches(function: str, *, timeout_seconds: float = 110.0) -> list[CompiledKernel]:
    """What "package.module:function" launches, each variant once, in order. Raises AssertionError with the log."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", __spec__.name, function],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-8000:]
    return [CompiledKernel(**fields) for fields in json.loads(run.stdout)]


def _main(function: str) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled: dict[str, CompiledKernel] = {}
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        if kernel.hash not in compiled:
            compiled[kernel.hash] = _inspect(kernel)
        return kernel

    class Driver:
        """Of a device that is only compiled for."""

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    driver.set_active(Driver())
    JITFunction.run = compile_only
    module, _, name = function.partition(":")
    getattr(import_module(module), name)()
    print(json.dumps([asdict(kernel) for kernel in compiled.values()]))


def _inspect(kernel: Any) -> CompiledKernel:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    counts = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    metadata = kernel.metadata
    return CompiledKernel(
        name=metadata.name,
        num_warps=metadata.num_warps,
        num_stages=metadata.num_stages,
        registers=counts["REG"],
        stack_bytes=counts["STACK"] + counts["LOCAL"],
        shared_bytes=metadata.shared,
    )


if __name__ == "__main__":
    _main(sys.argv[1])
