"""Blocks between the cache and staging memory, bit for bit."""

from __future__ import annotations

import pytest
import torch

from relevo.kernels import Kernels, load_backend


@pytest.fixture(params=["reference", "cpu", "triton"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return load_backend(request.param, "cpu")


# bytes of whole int64 words, of int32, of int16 and of none; the largest is more than one program's
@pytest.mark.parametrize("block_bytes", [8, 12, 30, 7, 8 * 2049])
@pytest.mark.parametrize("ids", [[], [4], [5, 0, 3]])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_blocks_come_out_and_go_back_in(kernels: Kernels, block_bytes: int, ids: list[int], dtype: torch.dtype) -> None:
    storage = torch.randint(0, 256, (6, block_bytes), dtype=torch.uint8)
    block_ids = torch.tensor(ids, dtype=dtype)
    out = torch.full((len(ids), block_bytes), 255, dtype=torch.uint8)
    kernels.gather_blocks(storage, block_ids, out)
    assert out.tolist() == [storage[i].tolist() for i in ids]

    other, expected = torch.randint(0, 256, (2, 6, block_bytes), dtype=torch.uint8)
    expected = other.clone()
    expected[ids] = storage[ids]
    kernels.scatter_blocks(out, block_ids, other)
    assert other.equal(expected)


def test_a_block_id_outside_the_cache_moves_nothing_with_triton() -> None:
    """A GPU could only raise by waiting."""
    kernels, ids = load_backend("triton", "cpu"), torch.tensor([-1, 1, 3])
    storage = torch.arange(24, dtype=torch.uint8).view(3, 8)
    out = torch.zeros(3, 8, dtype=torch.uint8)
    kernels.gather_blocks(storage, ids, out)
    assert out.tolist() == [[0] * 8, list(range(8, 16)), [0] * 8]
    target = torch.zeros(3, 8, dtype=torch.uint8)
    kernels.scatter_blocks(storage, ids, target)
    assert target.tolist() == [[0] * 8, list(range(8, 16)), [0] * 8]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_block_id_outside_the_cache_is_an_error_on_a_cpu(backend: str) -> None:
    kernels, storage = load_backend(backend, "cpu"), torch.zeros(3, 8, dtype=torch.uint8)
    with pytest.raises((IndexError, RuntimeError)):
        kernels.gather_blocks(storage, torch.tensor([3]), storage[:1].clone())
    with pytest.raises((IndexError, RuntimeError)):
        kernels.scatter_blocks(storage[:1].clone(), torch.tensor([3]), storage)
