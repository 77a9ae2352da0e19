"""Scales of an 8-bit KV cache, from the checkpoint to what a cache keeps."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from relevo.kernels import AttentionMetadata, reference
from relevo.models.attention import AttentionContext
from relevo.models.kv_scales import stored_kv_scales


def test_scales_are_found_by_name_and_one_that_is_missing_is_1(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    tensors = {
        "model.layers.0.self_attn.k_scale": torch.tensor([0.5]),
        "model.layers.0.self_attn.v_scale": torch.tensor(0.25, dtype=torch.bfloat16),
        "model.layers.2.self_attn.k_scale": torch.tensor([3.0]),
        "model.layers.1.self_attn.k_proj.weight_scale": torch.tensor([9.0]),
    }
    save_file(tensors, file)
    scales = stored_kv_scales([file], 3, torch.device("cpu"))
    assert scales is not None
    assert [(k.item(), v.item()) for k, v in scales] == [(0.5, 0.25), (1.0, 1.0), (3.0, 1.0)]
    assert all(scale.dtype == torch.float32 and scale.shape == (1,) for layer in scales for scale in layer)


def test_a_checkpoint_without_any_has_none(tmp_path: Path) -> None:
    save_file({"model.layers.0.self_attn.k_proj.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    assert stored_kv_scales([tmp_path / "model.safetensors"], 1, torch.device("cpu")) is None


def test_each_layer_is_stored_and_read_by_its_own_scales() -> None:
    ones = torch.ones(1, dtype=torch.int32)
    metadata = AttentionMetadata(
        torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64), ones,
        torch.tensor([0, 1], dtype=torch.int32), 1, 1,
    )  # fmt: skip
    caches = [(torch.zeros(1, 16, 1, 8).to(torch.float8_e4m3fn),) * 2 for _ in range(2)]
    caches = [(k.clone(), v.clone()) for k, v in caches]
    scales = [(torch.tensor([2.0]), torch.tensor([8.0])), (torch.tensor([4.0]), torch.tensor([0.5]))]
    context = AttentionContext(metadata, caches, reference, scales)
    x = torch.full((1, 1, 1, 8), 16.0)
    for layer, (k_scale, v_scale) in enumerate(scales):
        output = context.attend(torch.nn.Identity(), x, x, x, None, layer_idx=layer, scale=1.0)
        assert output.eq(16.0).all()
        assert caches[layer][0][0, 0].float().eq(16.0 / k_scale).all()
        assert caches[layer][1][0, 0].float().eq(16.0 / v_scale).all()
