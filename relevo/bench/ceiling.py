"""What the machine itself allows: products of matrices larger than its caches, and memory bandwidth. CPU only."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from relevo.core.errors import RelevoError
from relevo.kernels import load_backend

ROWS = (1, 8, 32, 256, 1024)
DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,  # weights; the input is float32
}
LAYER = (4864, 896)  # rows and columns of a weight matrix: a layer of Qwen2.5-0.5B
WEIGHT_BYTES = 256 << 20  # at least; four times the caches where that is more
PASS_SECONDS = 0.4  # a measurement goes over all the weights as often as fits in here, and at least twice
MAX_PASS_SECONDS = 0.6
CACHE_DIRECTORY = Path("/sys/devices/system/cpu")

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class GemmSpeed:
    """y = x · wᵀ with x [rows, k]. bytes: of the weights as this dtype has them."""

    dtype: str
    implementation: str
    rows: int
    gflops_per_second: float
    weight_gb_per_second: float


@dataclass(frozen=True, slots=True)
class Machine:
    """gemms: the best implementation for each dtype and number of rows; all: every implementation that there is;
    missing: those that there are not, and why.

    copy: bytes read and written; read: bytes read. GB/s are 10⁹ bytes a second.
    """

    num_threads: int
    cpu_capability: str
    weight_bytes: int
    copy_gb_per_second: float
    read_gb_per_second: float
    gemms: tuple[GemmSpeed, ...]
    all: tuple[GemmSpeed, ...]
    missing: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def seconds_per_weight(self, dtype: str, rows: float) -> float:
        """Of a product of `rows` rows, for each weight; log-linear between the numbers of rows that were measured."""
        speeds = sorted((each for each in self.gemms if each.dtype == dtype), key=lambda each: each.rows)
        if not speeds:
            raise KeyError(f"{dtype} was not measured")
        points = [(each.rows, 2 * each.rows / (1e9 * each.gflops_per_second)) for each in speeds]
        if rows >= points[-1][0]:
            return points[-1][1] * rows / points[-1][0]
        for (low, low_seconds), (high, high_seconds) in itertools.pairwise(points):
            if rows <= high:
                share: float = math.log(max(rows, low) / low) / math.log(high / low)
                return low_seconds * math.exp(share * math.log(high_seconds / low_seconds))
        return points[0][1]


def measure_machine(
    dtypes: Sequence[str], rows: Sequence[int] = ROWS, advance: Callable[[str], None] = lambda _: None
) -> Machine:
    """A few seconds for each dtype. `advance` is told what comes next."""
    weight_bytes = max(WEIGHT_BYTES, 4 * largest_cache_bytes())
    advance("memory")
    copy, read = _bandwidths(weight_bytes)
    speeds, missing = [], []
    for dtype, (name, prepare) in itertools.product(dtypes, IMPLEMENTATIONS.items()):
        count = -(-weight_bytes // (math.prod(LAYER) * DTYPES[dtype].itemsize))
        try:
            products = [prepare(_weight(DTYPES[dtype])) for _ in range(count)]
        except (RuntimeError, RelevoError) as error:  # not on this machine, or not for this dtype
            missing.append(f"{dtype}, {name}: {str(error).splitlines()[0][:200]}")
        else:
            for num_rows in rows:
                advance(f"{dtype}, {name}, {num_rows} rows")
                speeds.append(_measure(dtype, name, products, num_rows))
    best = {(each.dtype, each.rows): each for each in sorted(speeds, key=lambda each: each.gflops_per_second)}
    return Machine(
        num_threads=torch.get_num_threads(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        weight_bytes=weight_bytes,
        copy_gb_per_second=copy,
        read_gb_per_second=read,
        gemms=tuple(best[key] for key in sorted(best)),
        all=tuple(speeds),
        missing=tuple(missing),
    )


def largest_cache_bytes() -> int:
    """Of all processors together; 32 MiB where the system doesn't say."""
    sizes = {}
    for index in CACHE_DIRECTORY.glob("cpu[0-9]*/cache/index*"):
        try:
            size = (index / "size").read_text().strip()
            sizes[(index / "level").read_text() + (index / "shared_cpu_list").read_text()] = int(size[:-1]) << 10
        except (OSError, ValueError):
            continue
    return sum(sizes.values()) or 32 << 20


def _weight(dtype: torch.dtype) -> Tensor:
    if dtype == torch.int8:
        return torch.randint(-127, 128, LAYER, dtype=torch.int8)
    return (torch.randn(LAYER) * 0.02).to(dtype)


def _torch_product(weight: Tensor) -> Product:
    if weight.dtype != torch.int8:
        return lambda x: functional.linear(x, weight)
    scales = torch.full((weight.shape[0],), 0.01, dtype=torch.bfloat16)
    return lambda x: torch.ops.aten._weight_int8pack_mm(x.bfloat16(), weight, scales)


def _mkldnn_product(weight: Tensor) -> Product:
    if weight.dtype == torch.int8:
        raise RuntimeError("packed int8 wants int8 inputs too")
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    torch.ops.mkldnn._linear_pointwise(torch.zeros(1, LAYER[1], dtype=weight.dtype), packed, None, "none", [], "")
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def _relevo_product(weight: Tensor) -> Product:
    scales = [torch.full((weight.shape[0],), 0.01)] if weight.dtype == torch.int8 else None
    return load_backend("cpu", "cpu").prepare_linear([weight], [None], scales)


IMPLEMENTATIONS: Mapping[str, Callable[[Tensor], Product]] = {
    "torch": _torch_product,
    "mkldnn packed": _mkldnn_product,
    "relevo cpu": _relevo_product,
}


@torch.inference_mode()
def _measure(dtype: str, name: str, products: Sequence[Product], num_rows: int) -> GemmSpeed:
    torch_dtype = DTYPES[dtype]
    x = torch.randn(num_rows, LAYER[1]).to(torch.float32 if torch_dtype == torch.int8 else torch_dtype)
    products[0](x)
    started = time.perf_counter()
    products[0](x)
    seconds = time.perf_counter() - started
    # All of them where it is memory that matters; where computing does, as many as end in time.
    products = products[: max(2, int(MAX_PASS_SECONDS / seconds))]

    def over_all() -> None:
        for product in products:
            product(x)

    num_weights = len(products) * math.prod(LAYER)
    seconds = _best_seconds(over_all)
    return GemmSpeed(
        dtype=dtype,
        implementation=name,
        rows=num_rows,
        gflops_per_second=2e-9 * num_weights * num_rows / seconds,
        weight_gb_per_second=1e-9 * num_weights * torch_dtype.itemsize / seconds,
    )


def _bandwidths(num_bytes: int) -> tuple[float, float]:
    source, target = torch.ones(num_bytes // 4), torch.zeros(num_bytes // 4)
    copy = 2e-9 * num_bytes / _best_seconds(lambda: target.copy_(source))
    readers = (lambda: source.sum(), lambda: torch.dot(source, source), lambda: source.view(torch.int32).max())
    return copy, max(1e-9 * num_bytes / _best_seconds(reader) for reader in readers)


def _best_seconds(work: Callable[[], object]) -> float:
    best, deadline = math.inf, time.perf_counter() + PASS_SECONDS
    for repetition in range(100):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
        if repetition >= 1 and time.perf_counter() > deadline:
            break
    return best
