"""The kernels but attention's, compiled for a Hopper GPU in the shapes of an 8B model: nothing spills."""

from __future__ import annotations

from unittest.mock import patch

import torch
from torch import Tensor

from tests.kernels.compiling import compile_launches

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _first_ids(*size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What torch.empty gives while nothing is launched: top_k looks the ids up that its kernel would have found."""
    return torch.full(size, 0x7FFFFFFF if dtype == torch.int64 else 0, dtype=dtype, device=device)


def choosing() -> None:
    from relevo.kernels import triton
    from relevo.kernels.triton.warming import choose

    with patch.object(torch, "empty", _first_ids):
        choose(torch.device("cpu"))
        logits = torch.zeros(7, 50257)
        triton.top_k(logits, 40)
        triton.top_k(logits, 20)
        triton.argmax(logits)
        triton.score(logits, torch.zeros(7, 21, dtype=torch.int64))
        triton.sample(logits, [1.0] * 7, [0.0] * 7, [20] * 7, [0.9] * 7, [0.5] * 7)
    storage = torch.zeros(10, 4096, dtype=torch.uint8)
    triton.gather_blocks(storage, torch.zeros(3, dtype=torch.int32), storage[:3].clone())
    triton.scatter_blocks(storage[:3].clone(), torch.zeros(3, dtype=torch.int64), storage)


def layers() -> None:
    from relevo.kernels import triton

    for dtype in DTYPES:
        x, weight = torch.empty(64, 4096, dtype=dtype), torch.empty(4096, dtype=dtype)
        triton.rms_norm(x, weight, 1e-5)
        triton.add_rms_norm(x, x, weight, 1e-5)
        triton.rms_norm(torch.empty(4096, 40, 128, dtype=dtype), weight[:128], 1e-6)
        triton.gated_activation(torch.empty(8, 2 * 14336, dtype=dtype), "silu")
        triton.gated_activation(torch.empty(8, 2 * 14336, dtype=dtype), "gelu")
        triton.gated_activation(torch.empty(8, 2 * 14336, dtype=dtype), "gelu_tanh")
        query, key = torch.empty(8, 32, 128, dtype=dtype), torch.empty(8, 8, 128, dtype=dtype)
        slots, angles = torch.zeros(8, dtype=torch.int64), torch.empty(8, 128)
        for cache_dtype in (dtype, torch.float8_e4m3fn):
            cache = torch.empty(4, 16, 8, 128, dtype=cache_dtype)
            triton.rotary_store_kv(query, key, key, angles, angles, cache, cache, slots)
        triton.rotary_store_kv(query, key, key, angles[:, :96], angles[:, :96], cache, cache, slots)


def products() -> None:
    from relevo.kernels import triton

    for dtype in DTYPES:
        x, bias = torch.empty(128, 4096, dtype=dtype), torch.empty(4096, dtype=dtype)
        for rank in (8, 16, 64):
            a, b = torch.empty(2, rank, 4096, dtype=dtype), torch.empty(2, 4096, rank, dtype=dtype)
            triton.sgmv(x, a, b, torch.zeros(128, dtype=torch.int32), torch.ones(2), x.clone())
        weight = torch.empty(4096, 4096, dtype=torch.int8)
        biased = triton.prepare_linear([weight], [bias], [torch.ones(4096)])
        plain = triton.prepare_linear([weight], [None], [torch.ones(4096)])
        for rows in (1, 16, 64, 128):
            biased(x[:rows])
            plain(x[:rows])


def _check(function: str, names: set[str]) -> None:
    kernels = compile_launches(f"{__name__}:{function}")
    assert {kernel.name for kernel in kernels} == names
    assert all(kernel.fits for kernel in kernels), [kernel for kernel in kernels if not kernel.fits]


def test_triton_kernels_of_sampling_compile() -> None:
    sampling = {"sum_kernel", "list_kernel", "select_kernel", "race_kernel", "finish_kernel"}
    ranks = {"largest_kernel", "merge_largest_kernel", "top_keys_kernel", "score_kernel", "merge_scores_kernel"}
    others = {"mask_logits_kernel", "apply_penalties_kernel", "copy_blocks_kernel"}
    _check("choosing", sampling | ranks | others)


def test_triton_kernels_of_layers_compile() -> None:
    _check("layers", {"rms_norm_kernel", "gated_activation_kernel", "rotary_store_kv_kernel"})


def test_triton_kernels_of_products_compile() -> None:
    _check("products", {"int8_kernel", "add_parts_kernel", "down_kernel", "up_kernel"})
