"""Every backend against a naive computation in float64, in caches where whatever must not be read is NaN.

Tolerances, absolute, for outputs that are means of N(0, 1) values: float32 2e-5 (a few hundred roundings);
bfloat16 and float16 one rounding of an output below 4, plus 2e-5.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from relevo.kernels import AttentionMetadata, Kernels, load_backend, reference
from relevo.kernels.cpu import calls
from tests.kernels.paged import Batch, dense_attention, make_batch

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

# (seq_len, query_len): prefill, decode, chunks on top of a context, and drafts, around block and tile edges
EDGES = [(1, 1), (15, 15), (16, 1), (17, 17), (33, 1), (32, 5), (63, 31), (64, 2), (1, 1), (100, 40), (31, 3), (129, 1)]
MIXED = [(5, 5), (70, 1), (40, 9), (90, 2)]


@pytest.fixture(params=["reference", "cpu", "triton"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return load_backend(request.param, "cpu")


def check(kernels: Kernels, batch: Batch, *, threads: int = 1, **options: Any) -> None:
    kernels.store_kv(batch.key, batch.value, batch.k_cache, batch.v_cache, batch.metadata.slot_mapping)
    scale = batch.query.shape[-1] ** -0.5
    _poison_the_heap()
    torch.set_num_threads(threads)
    output = kernels.paged_attention(batch.query, batch.k_cache, batch.v_cache, batch.metadata, scale=scale, **options)
    torch.set_num_threads(1)
    expected = dense_attention(batch, scale=scale, **options)
    assert output.dtype == batch.query.dtype
    assert output.is_contiguous()
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=TOLERANCE[batch.query.dtype])


def _poison_the_heap() -> None:
    """Leave NaN in freed memory of many sizes, where outputs and work buffers are likely to be put next."""
    poison = [torch.full((1 << power,), float("nan")) for power in range(4, 18) for _ in range(3)]
    del poison
    calls._scratch.memory.fill_(255)  # what a thread works in, too: NaN in every float type


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("block_size", [1, 16, 24])
def test_mixed_lengths_around_block_edges(kernels: Kernels, dtype: torch.dtype, block_size: int) -> None:
    check(kernels, make_batch(EDGES, dtype=dtype, block_size=block_size))


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (14, 2), (8, 1), (12, 1), (71, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_query_heads_share_kv_heads(kernels: Kernels, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    check(kernels, make_batch(MIXED, heads=heads, kv_heads=kv_heads, dtype=dtype))


@pytest.mark.parametrize(
    ("k_dim", "v_dim"), [(16, 16), (80, 80), (128, 128), (256, 256), (192, 128), (20, 36), (65, 3)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_head_dim(kernels: Kernels, k_dim: int, v_dim: int, dtype: torch.dtype) -> None:
    check(kernels, make_batch(MIXED, k_dim=k_dim, v_dim=v_dim, dtype=dtype))


@pytest.mark.parametrize(("k_dim", "v_dim"), [(64, 64), (96, 96), (192, 192), (576, 512)])
@pytest.mark.parametrize("block_size", [32, 64])
def test_head_dims_and_block_sizes_that_are_served(kernels: Kernels, k_dim: int, v_dim: int, block_size: int) -> None:
    """Contexts of one token, and of a block less one, exactly one, and one more, with 1 and 4 queries."""
    lens = [(1, 1), (block_size - 1, 4), (block_size, 1), (block_size + 1, 4)]
    batch = make_batch(
        lens, heads=6, kv_heads=1 if k_dim > 256 else 2, k_dim=k_dim, v_dim=v_dim, block_size=block_size,
        dtype=torch.bfloat16,
    )  # fmt: skip
    check(kernels, batch)


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("drafts", [1, 4, 15])
def test_drafts_are_verified_over_split_contexts(kernels: Kernels, drafts: int, window: int | None) -> None:
    """Every sequence computes 1 + drafts tokens; 15 drafts of 5 heads a kv head are more rows than one tile has."""
    batch = make_batch([(530, 1 + drafts), (65, 1 + drafts)], heads=10, dtype=torch.bfloat16, sliding_window=window)
    check(kernels, batch, sliding_window=window)


@pytest.mark.parametrize("lens", [[(600, 1), (45, 3), (50, 20)], [(30, 30), (1, 1), (200, 8)]], ids=str)
def test_decodes_and_prompts_in_one_batch(kernels: Kernels, lens: list[tuple[int, int]]) -> None:
    check(kernels, make_batch(lens, heads=8, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("dtype", "scales"),
    [(torch.float32, None), (torch.float32, 2), (torch.bfloat16, 1)],
    ids=["float32-unscaled", "float32-a scale a head", "bfloat16-one scale"],
)
def test_an_fp8_cache_with_scales(kernels: Kernels, dtype: torch.dtype, scales: int | None) -> None:
    """Against attention over what the cache then holds, which is what torch rounds to; nothing else is rounded twice.

    bfloat16 rounds the weights too, and the scales make outputs larger by up to 1.5: two roundings below 4.
    """
    batch = make_batch(EDGES, dtype=dtype)
    given: dict[str, Any] = {}
    if scales is not None:
        given = {"k_scale": torch.tensor([0.5, 2.0])[:scales], "v_scale": torch.tensor([0.75, 1.5])[:scales]}
    batch = _in_fp8(batch, **given)
    kernels.store_kv(batch.key, batch.value, batch.k_cache, batch.v_cache, batch.metadata.slot_mapping, **given)
    output = kernels.paged_attention(batch.query, batch.k_cache, batch.v_cache, batch.metadata, scale=0.125, **given)
    tolerance = {torch.float32: 5e-5, torch.bfloat16: 3.2e-2}[dtype]
    torch.testing.assert_close(output.double(), dense_attention(batch, scale=0.125), rtol=0, atol=tolerance)


def _in_fp8(batch: Batch, k_scale: Tensor | None = None, v_scale: Tensor | None = None) -> Batch:
    """The same batch over caches in 8 bits, its contexts as they read back. This step's slots are NaN still."""

    def rounded(x: Tensor, scale: Tensor | None) -> Tensor:
        factor = torch.ones(1) if scale is None else scale
        return (x.float() / factor[:, None]).to(torch.float8_e4m3fn)

    def read_back(x: Tensor, scale: Tensor | None) -> Tensor:
        return rounded(x, scale).float() * (torch.ones(1) if scale is None else scale)[:, None]

    return replace(
        batch,
        k_cache=rounded(batch.k_cache, k_scale),
        v_cache=rounded(batch.v_cache, v_scale),
        contexts=[(read_back(key, k_scale), read_back(value, v_scale)) for key, value in batch.contexts],
    )


@pytest.mark.parametrize(
    ("window", "dtype"),
    [*((window, torch.float32) for window in (1, 7, 16, 33, 1000)), (16, torch.bfloat16), (33, torch.bfloat16)],
    ids=str,
)
def test_sliding_window_reads_nothing_that_left_it(kernels: Kernels, window: int, dtype: torch.dtype) -> None:
    check(kernels, make_batch(EDGES, dtype=dtype, sliding_window=window), sliding_window=window)


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(kernels: Kernels, softcap: float) -> None:
    check(kernels, make_batch(EDGES), softcap=softcap)


@pytest.mark.parametrize("window", [None, 9])
def test_sinks(kernels: Kernels, window: int | None) -> None:
    sinks = torch.tensor([-3.0, 0.0, 1.0, 5.0])
    check(kernels, make_batch(EDGES, sliding_window=window), sinks=sinks, sliding_window=window)


def test_everything_at_once(kernels: Kernels) -> None:
    options: dict[str, Any] = {"sliding_window": 21, "softcap": 4.0, "sinks": torch.randn(14).bfloat16()}
    check(kernels, make_batch(EDGES, heads=14, dtype=torch.bfloat16, sliding_window=21), **options)


@pytest.mark.parametrize("options", [{}, {"sinks": torch.ones(4), "softcap": 2.0}, {"sliding_window": 550}], ids=str)
@pytest.mark.parametrize("lens", [[(1201, 1)], [(800, 3), (9, 9)], [(600, 20), (1, 1)]], ids=str)
def test_long_contexts_are_split_and_merged(
    kernels: Kernels, lens: list[tuple[int, int]], options: dict[str, Any]
) -> None:
    check(kernels, make_batch(lens, sliding_window=options.get("sliding_window")), threads=2, **options)


@pytest.mark.parametrize("threads", [2, 5])
def test_any_number_of_threads(threads: int) -> None:
    kernels = load_backend("cpu", "cpu")
    check(kernels, make_batch([(700, 1), (300, 5), (20, 20)], heads=14, dtype=torch.bfloat16), threads=threads)


def test_large_logits_do_not_overflow(kernels: Kernels) -> None:
    """Logits of several hundred: their exp is infinite in float32, that of their differences is not."""
    batch = make_batch([(50, 20), (40, 1)])
    for keys in (batch.key, batch.k_cache, *(key for key, _ in batch.contexts)):
        keys *= 100
    kernels.store_kv(batch.key, batch.value, batch.k_cache, batch.v_cache, batch.metadata.slot_mapping)
    output = kernels.paged_attention(batch.query, batch.k_cache, batch.v_cache, batch.metadata, scale=0.125)
    # a logit of 400 is itself rounded by 2e-5, hence the tolerance
    torch.testing.assert_close(output.double(), dense_attention(batch, scale=0.125), rtol=0, atol=1e-3)


@pytest.mark.parametrize("seed", range(12))
def test_random_batches(kernels: Kernels, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    lens = []
    for _ in range(draw(1, 5)):
        seq_len = draw(1, 150)
        lens.append((seq_len, draw(1, min(seq_len, 40))))
    kv_heads, window = draw(1, 2), draw(1, 160) if draw(0, 1) else None
    batch = make_batch(
        lens,
        heads=kv_heads * draw(1, 8),
        kv_heads=kv_heads,
        k_dim=draw(16, 130),
        v_dim=draw(16, 130),
        block_size=draw(1, 64),
        dtype=(torch.float32, torch.bfloat16)[draw(0, 1)],
        sliding_window=window,
        seed=seed,
    )
    check(kernels, batch, sliding_window=window, softcap=3.0 if draw(0, 1) else None)


def test_a_query_may_have_any_strides(kernels: Kernels) -> None:
    batch = make_batch(MIXED)
    kernels.store_kv(batch.key, batch.value, batch.k_cache, batch.v_cache, batch.metadata.slot_mapping)
    outputs = [
        kernels.paged_attention(query, batch.k_cache, batch.v_cache, batch.metadata, scale=0.1)
        for query in (batch.query, batch.query.contiguous(), batch.query.permute(2, 0, 1).contiguous().permute(1, 2, 0))
    ]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=0, atol=TOLERANCE[torch.float32])


def test_float32_queries_over_a_bfloat16_cache(kernels: Kernels) -> None:
    batch = make_batch(MIXED, dtype=torch.bfloat16)
    kernels.store_kv(batch.key, batch.value, batch.k_cache, batch.v_cache, batch.metadata.slot_mapping)
    query = batch.query.float()
    output = kernels.paged_attention(query, batch.k_cache, batch.v_cache, batch.metadata, scale=0.1)
    torch.testing.assert_close(
        output.double(), dense_attention(batch, scale=0.1), rtol=0, atol=TOLERANCE[torch.float32]
    )


def test_a_sequence_without_tokens_in_this_step_is_skipped(kernels: Kernels) -> None:
    batch = make_batch([(20, 3), (30, 0), (9, 9)])
    check(kernels, batch)


def test_an_empty_batch_gives_an_empty_output(kernels: Kernels) -> None:
    batch = make_batch([(20, 3)])
    empty = AttentionMetadata(
        block_table=torch.zeros(0, 4, dtype=torch.int32),
        slot_mapping=torch.zeros(0, dtype=torch.int64),
        seq_lens=torch.zeros(0, dtype=torch.int32),
        cu_seqlens_q=torch.zeros(1, dtype=torch.int32),
        max_query_len=0,
        max_seq_len=0,
    )
    kernels.store_kv(batch.key[:0], batch.value[:0], batch.k_cache, batch.v_cache, empty.slot_mapping)
    output = kernels.paged_attention(batch.query[:0], batch.k_cache, batch.v_cache, empty, scale=1.0)
    assert output.shape == (0, 4, 64)


@pytest.mark.parametrize("block_id", [-1, 10**6])
def test_a_block_outside_the_cache_is_refused(block_id: int) -> None:
    """By the compiled backend, where it would otherwise be read: torch checks its indices itself."""
    batch = make_batch([(40, 1)])
    batch.metadata.block_table[0, 1] = block_id
    with pytest.raises(IndexError, match="not in the cache"):
        load_backend("cpu", "cpu").paged_attention(batch.query, batch.k_cache, batch.v_cache, batch.metadata, scale=1.0)


def test_a_sequence_longer_than_its_block_table_is_refused() -> None:
    batch = make_batch([(40, 1)])
    batch.metadata.seq_lens[0] = 16 * 6
    with pytest.raises(IndexError, match="longer than its row"):
        load_backend("cpu", "cpu").paged_attention(batch.query, batch.k_cache, batch.v_cache, batch.metadata, scale=1.0)


def test_layers_share_a_plan_and_kinds_of_layers_do_not() -> None:
    """Layers of one kind, then others over the same metadata: another window, another number of heads, and threads."""
    kernels = load_backend("cpu", "cpu")
    batch = make_batch([(700, 1), (90, 30)], heads=4)
    check(kernels, batch, threads=2)
    check(kernels, batch, threads=2)
    assert len(batch.metadata.plans) == 1
    check(kernels, batch, threads=2, sliding_window=33)
    check(kernels, batch, threads=1)
    assert len(batch.metadata.plans) == 3
    query = batch.query[:, :2]
    narrow = kernels.paged_attention(query, batch.k_cache, batch.v_cache, batch.metadata, scale=0.1, softcap=5.0)
    expected = reference.paged_attention(query, batch.k_cache, batch.v_cache, batch.metadata, scale=0.1, softcap=5.0)
    torch.testing.assert_close(narrow, expected, rtol=0, atol=TOLERANCE[torch.float32])


def test_threads_may_attend_at_the_same_time() -> None:
    """Two engines in one process: each thread's outputs are what they are when it is alone."""
    torch.set_num_threads(2)
    kernels = load_backend("cpu", "cpu")
    batches = [make_batch([(600, 1), (90, 30)], heads=14, seed=seed) for seed in range(4)]

    def attend(batch: Batch) -> torch.Tensor:
        return kernels.paged_attention(batch.query, batch.k_cache, batch.v_cache, batch.metadata, scale=0.1)

    for batch in batches:
        kernels.store_kv(batch.key, batch.value, batch.k_cache, batch.v_cache, batch.metadata.slot_mapping)
    alone = [attend(batch) for batch in batches]
    wrong: list[int] = []

    def repeat(i: int) -> None:
        if not all(attend(batches[i]).equal(alone[i]) for _ in range(5)):
            wrong.append(i)

    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_padded_row_without_context_gives_zeros() -> None:
    """As a captured batch has them: a query, no keys, and a block table that names nothing."""
    kernels = load_backend("triton", "cpu")
    batch = make_batch([(700, 1), (1, 1)])
    kernels.store_kv(batch.key, batch.value, batch.k_cache, batch.v_cache, batch.metadata.slot_mapping)
    batch.metadata.seq_lens[1] = 0
    output = kernels.paged_attention(batch.query, batch.k_cache, batch.v_cache, batch.metadata, scale=0.1)
    assert output[1].eq(0).all()
    assert output[0].isfinite().all()


@pytest.mark.parametrize("longest", [700, 5000])
def test_a_captured_grid_serves_shorter_contexts(longest: int) -> None:
    """max_seq_len is the longest context that a graph may ever see: more splits than a short one needs."""
    kernels = load_backend("triton", "cpu")
    batch = make_batch([(700, 1), (33, 1), (16, 1)])
    batch = replace(batch, metadata=replace(batch.metadata, max_seq_len=longest))
    check(kernels, batch)
