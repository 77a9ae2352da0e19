"""store_kv writes its slots, and nothing else."""

from __future__ import annotations

import pytest
import torch

from relevo.kernels import Kernels, load_backend
from tests.kernels.paged import make_batch


@pytest.fixture(params=["reference", "cpu", "triton"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return load_backend(request.param, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("k_dim", "v_dim", "block_size"), [(64, 64, 16), (20, 7, 1), (128, 64, 5)])
def test_slots_are_written_and_nothing_else(
    kernels: Kernels, dtype: torch.dtype, k_dim: int, v_dim: int, block_size: int
) -> None:
    batch = make_batch([(30, 7), (5, 5), (64, 1)], k_dim=k_dim, v_dim=v_dim, block_size=block_size, dtype=dtype)
    batch.storage.copy_(torch.randn(batch.storage.shape))
    expected = batch.storage.clone()
    layer = block_size * 2 * (k_dim + v_dim)
    for token, slot in enumerate(batch.metadata.slot_mapping.tolist()):
        block_id, offset = divmod(slot, block_size)
        k_begin = layer + offset * 2 * k_dim
        v_begin = layer + block_size * 2 * k_dim + offset * 2 * v_dim
        expected[block_id, k_begin : k_begin + 2 * k_dim] = batch.key[token].flatten()
        expected[block_id, v_begin : v_begin + 2 * v_dim] = batch.value[token].flatten()
    kernels.store_kv(batch.key, batch.value, batch.k_cache, batch.v_cache, batch.metadata.slot_mapping)
    assert batch.storage.equal(expected)


def test_sources_may_have_any_strides(kernels: Kernels) -> None:
    """As slices of a merged projection, and with the last dimension strided."""
    batch = make_batch([(30, 7)])
    merged = torch.randn(7, 2 * 2 * 64)
    key = merged[:, :128].view(7, 2, 64)
    value = torch.randn(64, 2, 7).permute(2, 1, 0)
    kernels.store_kv(key, value, batch.k_cache, batch.v_cache, batch.metadata.slot_mapping)
    for token, slot in enumerate(batch.metadata.slot_mapping.tolist()):
        assert batch.k_cache[slot // 16, slot % 16].equal(key[token])
        assert batch.v_cache[slot // 16, slot % 16].equal(value[token])


def test_float32_keys_are_rounded_to_the_cache(kernels: Kernels) -> None:
    batch = make_batch([(30, 7)], dtype=torch.bfloat16)
    key, value = torch.randn(7, 2, 64), torch.randn(7, 2, 64)
    kernels.store_kv(key, value, batch.k_cache, batch.v_cache, batch.metadata.slot_mapping)
    for token, slot in enumerate(batch.metadata.slot_mapping.tolist()):
        assert batch.k_cache[slot // 16, slot % 16].equal(key[token].bfloat16())
        assert batch.v_cache[slot // 16, slot % 16].equal(value[token].bfloat16())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_slot_past_the_cache_is_refused(backend: str) -> None:
    batch = make_batch([(30, 1)])
    slots = torch.tensor([batch.storage.shape[0] * 16])
    with pytest.raises(IndexError):
        load_backend(backend, "cpu").store_kv(batch.key, batch.value, batch.k_cache, batch.v_cache, slots)


def test_triton_writes_nothing_for_a_slot_outside_the_cache() -> None:
    """A GPU is not waited for, and a padded batch has such tokens."""
    batch = make_batch([(30, 3)])
    batch.storage.zero_()
    slots = torch.tensor([-1, batch.storage.shape[0] * 16, 5])
    load_backend("triton", "cpu").store_kv(batch.key, batch.value, batch.k_cache, batch.v_cache, slots)
    assert batch.k_cache[0, 5].equal(batch.key[2])
    assert batch.k_cache.count_nonzero() == batch.key[2].count_nonzero()


@pytest.mark.parametrize("scales", [None, 1, 2], ids=["unscaled", "a layer", "a head"])
def test_an_fp8_cache_rounds_what_is_scaled_and_holds_the_largest(kernels: Kernels, scales: int | None) -> None:
    """By rotary_store_kv with no rotation, too. 448 is the largest number of the format."""
    key, value = torch.randn(5, 2, 64) * 3, torch.randn(5, 2, 32) * 3
    key[0, 0, :2] = torch.tensor([1e4, -1e4])
    slots = torch.tensor([3, 0, 17, 9, 31])
    given = {}
    if scales is not None:
        given = {"k_scale": torch.tensor([0.5, 2.0])[:scales], "v_scale": torch.tensor([0.7, 3.0])[:scales]}
    for rotary in (False, True):
        k_cache = torch.zeros(2, 16, 2, 64, dtype=torch.float8_e4m3fn)
        v_cache = torch.zeros(2, 16, 2, 32, dtype=torch.float8_e4m3fn)
        if rotary:
            cos, sin = torch.ones(5, 64), torch.zeros(5, 64)
            kernels.rotary_store_kv(key, key, value, cos, sin, k_cache, v_cache, slots, **given)
        else:
            kernels.store_kv(key, value, k_cache, v_cache, slots, **given)
        for x, cache, scale in ((key, k_cache, given.get("k_scale")), (value, v_cache, given.get("v_scale"))):
            wanted = (x if scale is None else x / scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
            stored = cache.view(torch.uint8)[slots // 16, slots % 16].view(torch.float8_e4m3fn)
            assert stored.float().equal(wanted.float())
