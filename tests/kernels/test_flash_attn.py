"""FlashAttention in Triton's place: by a stand-in that takes the real call's arguments, since it needs a GPU itself."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from relevo.kernels import AttentionMetadata, load_backend, reference
from tests.kernels.paged import dense_attention, make_batch


class StandIn(ModuleType):
    """flash_attn_interface, as its source documents it (FlashAttention 3)."""

    def __init__(self) -> None:
        super().__init__("flash_attn_interface")
        self.__spec__ = ModuleSpec(self.__name__, None)
        self.num_calls = 0

    def flash_attn_with_kvcache(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        cache_seqlens: Tensor,
        page_table: Tensor,
        cu_seqlens_q: Tensor,
        max_seqlen_q: int,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int],
        softcap: float,
    ) -> Tensor:
        self.num_calls += 1
        assert causal
        assert q.stride(2) == 1
        left, right = window_size
        assert (left == -1) == (right == -1)
        metadata = AttentionMetadata(
            page_table, torch.empty(0), cache_seqlens, cu_seqlens_q, max_seqlen_q, int(cache_seqlens.max())
        )
        return reference.paged_attention(
            q,
            k_cache,
            v_cache,
            metadata,
            scale=softmax_scale,
            sliding_window=None if left == -1 else left + 1,  # keys [position - left, position]
            softcap=softcap or None,
        )


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    module = StandIn()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    from relevo.kernels import flash_attn

    monkeypatch.setattr(flash_attn, "is_hopper", lambda device: True)
    return module


@pytest.mark.parametrize("name", ["auto", "flash-attn"])
def test_it_is_chosen_where_it_is_installed(stand_in: StandIn, name: str) -> None:
    assert getattr(load_backend(name, "cuda:0"), "__name__", None) == "relevo.kernels.flash_attn"


def test_asked_for_and_not_installed_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'flash-attn'.*not installed"):
        load_backend("flash-attn", "cuda:0")


@pytest.mark.parametrize("options", [{}, {"sliding_window": 9}, {"softcap": 4.0}], ids=str)
def test_what_it_is_told_means_what_we_mean(stand_in: StandIn, options: dict[str, Any]) -> None:
    kernels = load_backend("flash-attn", "cuda")
    batch = make_batch([(40, 9), (17, 1)], dtype=torch.bfloat16, sliding_window=options.get("sliding_window"))
    kernels.store_kv(batch.key, batch.value, batch.k_cache, batch.v_cache, batch.metadata.slot_mapping)
    output = kernels.paged_attention(batch.query, batch.k_cache, batch.v_cache, batch.metadata, scale=0.1, **options)
    assert stand_in.num_calls == 1
    torch.testing.assert_close(output.double(), dense_attention(batch, scale=0.1, **options), rtol=0, atol=1.6e-2)


@pytest.mark.parametrize(
    ("dtype", "dim", "options"),
    [(torch.float32, 64, {}), (torch.bfloat16, 80, {}), (torch.bfloat16, 64, {"sinks": torch.ones(4)})],
    ids=["float32", "head dim", "sinks"],
)
def test_what_it_cannot_do_is_left_to_triton(
    stand_in: StandIn, dtype: torch.dtype, dim: int, options: dict[str, Any]
) -> None:
    kernels = load_backend("flash-attn", "cuda")
    batch = make_batch([(20, 3), (17, 1)], dtype=dtype, k_dim=dim)
    kernels.store_kv(batch.key, batch.value, batch.k_cache, batch.v_cache, batch.metadata.slot_mapping)
    output = kernels.paged_attention(batch.query, batch.k_cache, batch.v_cache, batch.metadata, scale=0.1, **options)
    assert stand_in.num_calls == 0
    torch.testing.assert_close(output.double(), dense_attention(batch, scale=0.1, **options), rtol=0, atol=1.6e-2)
