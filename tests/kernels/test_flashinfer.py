"""FlashInfer in Triton's place: by a stand-in that takes the real calls' arguments, since it needs a GPU itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from relevo import kernels as package
from relevo.engine.batch import FlatBatch, Span, flat_batch
from relevo.kernels import AttentionMetadata, Kernels, flashinfer, load_backend, reference
from relevo.kernels.metadata import HostBatch
from tests.kernels.paged import Batch, dense_attention, make_batch

KIND = flashinfer._Kind(64, 4, 128, 16, torch.bfloat16, 0.1, -1, 0.0)
MIXED = [(40, 9), (17, 1), (16, 16), (33, 1), (1, 1), (100, 52)]


class Wrapper:
    """flashinfer.BatchPrefillWithPagedKVCacheWrapper, as its docstrings have it (0.6.18).

    One plan at a time, for any number of runs.
    """

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD") -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert float_workspace_buffer.numel() >= 128 << 20
        assert kv_layout == "NHD"
        self.workspace = float_workspace_buffer
        self.kv_lens = torch.empty(32768, dtype=torch.int32)
        self.num_plans = self.num_runs = 0

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
        seq_lens: Tensor | None = None,
    ) -> None:
        assert seq_lens is not None, "it would make them, in memory that is not pinned"
        on_host = (qo_indptr, paged_kv_indptr, paged_kv_last_page_len, seq_lens)
        assert all(tensor.device.type == "cpu" and tensor.dim() == 1 for tensor in on_host)
        assert all(tensor.dtype == torch.int32 for tensor in (*on_host, paged_kv_indices))
        num_seqs = len(qo_indptr) - 1
        assert [len(tensor) for tensor in on_host] == [num_seqs + 1, num_seqs + 1, num_seqs, num_seqs]
        assert qo_indptr[0] == paged_kv_indptr[0] == 0
        assert len(paged_kv_indices) == paged_kv_indptr[-1]
        assert ((paged_kv_last_page_len >= 1) & (paged_kv_last_page_len <= page_size)).all()
        assert num_qo_heads % num_kv_heads == 0
        assert causal
        counts = paged_kv_indptr.diff()
        assert (page_size * (counts - 1) + paged_kv_last_page_len == seq_lens).all()

        block_table = torch.full((num_seqs, int(counts.max())), 2**31 - 1, dtype=torch.int32)
        for row, (begin, count) in enumerate(zip(paged_kv_indptr.tolist(), counts.tolist(), strict=False)):
            block_table[row, :count] = paged_kv_indices[begin : begin + count]
        self.metadata = AttentionMetadata(
            block_table, torch.empty(0), seq_lens, qo_indptr, int(qo_indptr.diff().max()), int(seq_lens.max())
        )
        self.shape = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        self.dtypes = (q_data_type, kv_data_type or q_data_type)
        self.options: dict[str, Any] = {
            "scale": head_dim_qk**-0.5 if sm_scale is None else sm_scale,
            "sliding_window": None if window_left == -1 else window_left + 1,  # keys [position - left, position]
            "softcap": logits_soft_cap or None,
        }
        self.kv_lens[:num_seqs].copy_(seq_lens)
        self.num_plans += 1

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor) -> Tensor:
        k_cache, v_cache = paged_kv_cache
        assert (q.dtype, k_cache.dtype) == self.dtypes
        assert (q.shape[1], k_cache.shape[2], q.shape[2], k_cache.shape[1]) == self.shape
        assert len(q) == self.metadata.cu_seqlens_q[-1]
        assert q.stride(2) == k_cache.stride(3) == 1
        assert k_cache.stride() == v_cache.stride(), "of FA3: same page stride, same stride of tokens"
        assert out.dtype == q.dtype and out.is_contiguous()
        self.num_runs += 1
        return out.copy_(reference.paged_attention(q, k_cache, v_cache, self.metadata, **self.options))


class StandIn(ModuleType):
    def __init__(self) -> None:
        super().__init__("flashinfer")
        self.__spec__ = ModuleSpec(self.__name__, None)
        self.wrappers: list[Wrapper] = []

    def BatchPrefillWithPagedKVCacheWrapper(self, *args: Any) -> Wrapper:
        self.wrappers.append(Wrapper(*args))
        return self.wrappers[-1]

    @property
    def num_plans(self) -> int:
        return sum(wrapper.num_plans for wrapper in self.wrappers)

    @property
    def num_runs(self) -> int:
        return sum(wrapper.num_runs for wrapper in self.wrappers)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    module = StandIn()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    flashinfer._planners.cache_clear()
    yield module
    flashinfer._planners.cache_clear()


@pytest.fixture
def kernels(stand_in: StandIn) -> Kernels:
    return load_backend("flashinfer", "cuda")


def planned_batch(lens: list[tuple[int, int]] = MIXED, **options: Any) -> Batch:
    """As an engine launches it: with the lengths on the host. In the cache."""
    batch = make_batch(lens, **{"dtype": torch.bfloat16, **options})
    metadata = batch.metadata
    tensors = metadata.block_table, metadata.seq_lens, metadata.cu_seqlens_q
    reference.store_kv(batch.key, batch.value, batch.k_cache, batch.v_cache, metadata.slot_mapping)
    return replace(batch, metadata=replace(metadata, host=HostBatch(*(tensor.numpy() for tensor in tensors))))


def attend(kernels: Kernels, batch: Batch, **options: Any) -> None:
    output = kernels.paged_attention(batch.query, batch.k_cache, batch.v_cache, batch.metadata, scale=0.1, **options)
    torch.testing.assert_close(output.double(), dense_attention(batch, scale=0.1, **options), rtol=0, atol=1.6e-2)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 9}, {"sliding_window": 1}, {"softcap": 4.0}], ids=str)
def test_what_it_is_told_means_what_we_mean(stand_in: StandIn, kernels: Kernels, options: dict[str, Any]) -> None:
    attend(kernels, planned_batch(sliding_window=options.get("sliding_window")), **options)
    assert (stand_in.num_plans, stand_in.num_runs) == (1, 1)


@pytest.mark.parametrize("seed", range(8))
def test_random_batches(stand_in: StandIn, kernels: Kernels, seed: int) -> None:
    """Prompts from their beginning, chunks on context, decodes beside them; any group of heads, any block size."""
    rng = np.random.default_rng(seed)
    seq_lens = rng.integers(1, 150, size=rng.integers(1, 7))
    queries = [int(rng.choice([1, seq_len, rng.integers(1, seq_len + 1)])) for seq_len in seq_lens]
    kv_heads = int(rng.integers(1, 4))
    batch = planned_batch(
        list(zip(seq_lens.tolist(), queries, strict=True)),
        heads=kv_heads * int(rng.integers(1, 6)),
        kv_heads=kv_heads,
        k_dim=int(rng.choice([64, 128])),
        block_size=int(rng.choice([16, 32, 64])),
        seed=seed,
    )
    attend(kernels, batch)
    assert stand_in.num_runs == 1


def test_layers_of_a_kind_share_a_plan(stand_in: StandIn, kernels: Kernels) -> None:
    """Windows in every other layer: two plans a step."""
    for step in range(3):
        batch = planned_batch(seed=step)
        for _ in range(3):
            attend(kernels, batch)
            attend(kernels, batch, sliding_window=30)
        assert stand_in.num_plans == 2 * (step + 1)
    assert stand_in.num_runs == 18
    assert len(stand_in.wrappers) == 4
    assert len({wrapper.workspace.data_ptr() for wrapper in stand_in.wrappers}) == 1


def test_steps_of_a_kind_take_turns(stand_in: StandIn, kernels: Kernels) -> None:
    """What the step before has planned is not touched: its copy may be on its way."""
    first, second = planned_batch(seed=1), planned_batch(seed=2)
    attend(kernels, first)
    attend(kernels, second)
    assert [wrapper.num_plans for wrapper in stand_in.wrappers] == [1, 1]
    attend(kernels, first)
    assert stand_in.num_plans == 2


def test_a_plan_that_others_have_replaced_is_made_again(stand_in: StandIn, kernels: Kernels) -> None:
    """As it happens to engines of one process."""
    first = planned_batch(seed=1)
    attend(kernels, first)
    for seed in (2, 3):
        attend(kernels, planned_batch(seed=seed))
    attend(kernels, first)
    assert stand_in.num_plans == 4


def test_what_was_made_in_inference_mode_serves_outside_of_it(stand_in: StandIn, kernels: Kernels) -> None:
    with torch.inference_mode():
        attend(kernels, planned_batch())
    for _ in range(2):
        attend(kernels, planned_batch())
    assert [wrapper.num_plans for wrapper in stand_in.wrappers] == [2, 1]


def test_a_planner_waits_for_its_own_last_copy_alone(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: before it writes where that copy reads."""
    done: list[str] = []

    class Event:
        def synchronize(self) -> None:
            done.append("wait")

        def record(self) -> None:
            done.append(f"copy {stand_in.num_plans}")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(flashinfer, "_workspace", lambda num_bytes, device: torch.empty(num_bytes, dtype=torch.uint8))
    monkeypatch.setattr(flashinfer, "num_multiprocessors", lambda device: 132)
    planner = flashinfer._Planner(KIND, torch.device("cuda"))
    host = planned_batch().metadata.host
    assert host is not None
    pages = flashinfer._pages(host, KIND.block_size, torch.device("cpu"))
    for _ in range(2):
        planner.plan(pages)
    assert done == ["wait", "copy 1", "wait", "copy 2"]


def test_an_engines_batch_has_its_lengths_on_the_host() -> None:
    batch: FlatBatch = flat_batch(range(5), [Span([3, 7], 14, 4), Span([2], 0, 1)], [3, 4], 16)
    host = batch.metadata(*(torch.from_numpy(array) for array in batch.arrays[3:])).host
    assert host is not None
    assert host.block_table.tolist() == [[3, 7], [2, 0]]
    assert host.seq_lens.tolist() == [18, 1]
    assert host.cu_seqlens_q.tolist() == [0, 4, 5]


def test_a_graphs_batch_is_left_to_triton(stand_in: StandIn, kernels: Kernels) -> None:
    batch = planned_batch()
    attend(kernels, replace(batch, metadata=replace(batch.metadata, host=None)))
    assert stand_in.num_runs == 0


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({"dtype": torch.float32}, {}),
        ({"k_dim": 80}, {}),
        ({"k_dim": 128, "v_dim": 64}, {}),
        ({"block_size": 8}, {}),
        ({}, {"sinks": torch.ones(4)}),
    ],
    ids=["float32", "head dim", "K and V differ", "block size", "sinks"],
)
def test_what_it_cannot_do_is_left_to_triton(
    stand_in: StandIn, kernels: Kernels, shape: dict[str, Any], options: dict[str, Any]
) -> None:
    attend(kernels, planned_batch([(20, 3), (17, 1)], **shape), **options)
    assert stand_in.num_runs == 0


def test_a_cache_in_8_bits_is_left_to_triton(stand_in: StandIn, kernels: Kernels) -> None:
    batch = planned_batch([(20, 3), (17, 1)])
    k_cache, v_cache = (cache.nan_to_num().to(torch.float8_e4m3fn) for cache in (batch.k_cache, batch.v_cache))
    scales: dict[str, Any] = {"k_scale": torch.tensor([0.5, 2.0]), "v_scale": torch.tensor([0.75, 1.5])}
    output = kernels.paged_attention(batch.query, k_cache, v_cache, batch.metadata, scale=0.1, **scales)
    expected = reference.paged_attention(batch.query, k_cache, v_cache, batch.metadata, scale=0.1, **scales)
    torch.testing.assert_close(output, expected, rtol=0, atol=1.6e-2)
    assert stand_in.num_runs == 0


def test_many_heads_over_few_get_a_larger_workspace() -> None:
    """Of a device with 170 multiprocessors: 64 query heads, 4 of KV."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flashinfer, "num_multiprocessors", lambda device: 170)
        assert flashinfer._workspace_bytes(KIND, torch.device("cpu")) == 64 * 85 * 128 * 129 * 4


@pytest.mark.parametrize(
    ("installed", "hopper", "chosen"),
    [
        ({"triton"}, True, "triton"),
        ({"triton", "flashinfer"}, True, "triton"),
        ({"triton", "flashinfer", "nvcc"}, True, "flashinfer"),
        ({"triton", "flashinfer", "flashinfer_jit_cache"}, False, "flashinfer"),
        ({"triton", "flashinfer", "nvcc", "flash_attn_interface"}, True, "flash_attn"),
        ({"triton", "flashinfer", "nvcc", "flash_attn_interface"}, False, "flashinfer"),
        ({"triton", "flash_attn_interface"}, False, "triton"),
        ({"flashinfer", "nvcc"}, False, "reference"),
    ],
)
def test_auto_takes_what_is_installed_and_can_run(
    monkeypatch: pytest.MonkeyPatch, installed: set[str], hopper: bool, chosen: str
) -> None:
    """Loading it calls nothing of the package's own: here it is not installed at all."""
    monkeypatch.setattr(package, "find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr(package, "which", lambda name: name if name in installed else None)
    monkeypatch.setattr("relevo.kernels.flash_attn.is_hopper", lambda device: hopper)
    assert getattr(load_backend("auto", "cuda:0"), "__name__", None) == f"relevo.kernels.{chosen}"


def test_asked_for_and_not_installed_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'flashinfer'.*not installed"):
        load_backend("flashinfer", "cuda:0")


def test_it_is_refused_on_a_cpu(stand_in: StandIn) -> None:
    with pytest.raises(ValueError, match=r"'flashinfer' needs a GPU"):
        load_backend("flashinfer", "cpu")
