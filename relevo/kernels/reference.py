"""The oracle: every kernel in plain torch, on any device; attention one sequence at a time.

Computes in float32, or in float64 where the query is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from relevo.kernels.metadata import AttentionMetadata
from relevo.kernels.sampling import sample as sample

WIDENS_16_BITS = False

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


class Linear:
    """Weights as they are given, joined; see `Kernels.prepare_linear`."""

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self.num_bytes = weight.numel() * weight.element_size()
        self._weight = weight
        self._bias = bias
        self._scale = scale

    def __call__(self, x: Tensor) -> Tensor:
        if self._scale is None:
            return functional.linear(x, self._weight, self._bias)
        output = functional.linear(_wide(x), _wide(self._weight).to(_wide(x).dtype)) * self._scale
        return (output if self._bias is None else output + self._bias).to(x.dtype)


def prepare_linear(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], scales: Sequence[Tensor] | None = None
) -> Linear:
    """Join the layers; see `Kernels.prepare_linear`."""
    weight = weights[0] if len(weights) == 1 else torch.cat(list(weights))
    return Linear(weight, joined_biases(weights, biases), None if scales is None else torch.cat(list(scales)))


def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
    """See `Kernels.rms_norm`."""
    wide = _wide(x)
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (normed * (weight.to(wide.dtype) + weight_offset)).to(x.dtype).contiguous()


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """See `Kernels.add_rms_norm`."""
    total = x + residual
    return rms_norm(total, weight, eps, weight_offset), total


def rotary_store_kv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """See `Kernels.rotary_store_kv`."""
    store_kv(_rotate(key, cos, sin), value, k_cache, v_cache, slot_mapping, k_scale, v_scale)
    return _rotate(query, cos, sin).contiguous()


def gated_activation(x: Tensor, activation: str) -> Tensor:
    """See `Kernels.gated_activation`."""
    gate, up = _wide(x).chunk(2, dim=-1)
    return (_ACTIVATIONS[activation](gate) * up).to(x.dtype)


def argmax(logits: Tensor) -> Tensor:
    """See `Kernels.argmax`."""
    # torch's own does not say which of several equals it takes. A NaN counts as the largest, as in a sort.
    largest = (logits == logits.amax(dim=-1, keepdim=True)) | logits.isnan()
    ids = torch.arange(logits.shape[1], device=logits.device)
    return torch.where(largest, ids, logits.shape[1]).amin(dim=-1)


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `Kernels.top_k`."""
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    return values[:, :k].contiguous(), ids[:, :k].contiguous()


def mask_logits(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    """See `Kernels.mask_logits`."""
    bits = (masks.unsqueeze(-1) >> torch.arange(32, device=masks.device, dtype=torch.int32)) & 1
    excluded = bits.flatten(1)[:, : logits.shape[1]] == 0
    logits[rows] = logits[rows].masked_fill(excluded, float("-inf"))


def score(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """See `Kernels.score`."""
    likelier = (logits > logits.gather(1, token_ids[:, :1])).sum(dim=-1)
    return logits.log_softmax(dim=-1).gather(1, token_ids), likelier


def apply_penalties(logits: Tensor, rows: Tensor, token_ids: Tensor, counts: Tensor, penalties: Tensor) -> None:
    """See `Kernels.apply_penalties`."""
    repetition, frequency, presence = penalties[rows].unbind(dim=1)
    values = logits[rows, token_ids]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values = values - frequency * counts - torch.where(counts > 0, presence, 0.0)
    logits[rows, token_ids] = values


def gather_blocks(storage: Tensor, block_ids: Tensor, out: Tensor) -> None:
    """See `Kernels.gather_blocks`."""
    torch.index_select(storage, 0, block_ids, out=out)


def scatter_blocks(source: Tensor, block_ids: Tensor, storage: Tensor) -> None:
    """See `Kernels.scatter_blocks`."""
    storage.index_copy_(0, block_ids.long(), source)


def sgmv(x: Tensor, a: Tensor, b: Tensor, adapters: Tensor, scale: Tensor, out: Tensor) -> None:
    """See `Kernels.sgmv`. One adapter at a time."""
    for adapter in range(len(a)):
        rows = adapters == adapter
        small = _wide(x[rows]) @ _wide(a[adapter]).T
        out[rows] = (_wide(out[rows]) + scale[adapter] * (small @ _wide(b[adapter]).T)).to(out.dtype)


def store_kv(
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Write a step's keys and values into the cache; see `Kernels.store_kv`."""
    block_size = k_cache.shape[1]
    block_ids, offsets = slot_mapping // block_size, slot_mapping % block_size
    _indexable(k_cache)[block_ids, offsets] = _rounded(key, k_cache.dtype, k_scale)
    _indexable(v_cache)[block_ids, offsets] = _rounded(value, v_cache.dtype, v_scale)


def paged_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Causal attention over the paged cache; see `Kernels.paged_attention`."""
    num_tokens, heads, _ = query.shape
    output = query.new_empty(num_tokens, heads, v_cache.shape[-1])
    bounds, seq_lens = metadata.cu_seqlens_q.tolist(), metadata.seq_lens.tolist()
    for i, seq_len in enumerate(seq_lens):
        # this step's tokens: [begin, end) of the batch, [seq_len - (end - begin), seq_len) of the sequence
        begin, end = bounds[i], bounds[i + 1]
        if begin == end:
            continue
        first_position = seq_len - (end - begin)
        first_key = 0 if sliding_window is None else max(0, first_position - sliding_window + 1)
        output[begin:end] = _attend(
            query[begin:end],
            _context(k_cache, metadata.block_table[i], first_key, seq_len, k_scale),
            _context(v_cache, metadata.block_table[i], first_key, seq_len, v_scale),
            _visible(first_position, first_key, seq_len, sliding_window, query.device),
            scale=scale,
            softcap=softcap,
            sinks=sinks,
        )
    return output


def warm_up(dtype: torch.dtype) -> None:
    """Nothing to compile."""


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def joined_biases(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor | None:
    """Side by side, zeros where a layer has none; None if no layer has any."""
    given = next((bias for bias in biases if bias is not None), None)
    if given is None:
        return None
    return torch.cat(
        [given.new_zeros(len(weight)) if bias is None else bias for weight, bias in zip(weights, biases, strict=True)]
    )


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[num_tokens, heads, dim] rotated by [num_tokens, rot_dim]."""
    wide = _wide(x)
    rotated, rest = wide[..., : cos.shape[-1]], wide[..., cos.shape[-1] :]
    left, right = rotated.chunk(2, dim=-1)
    turned = torch.cat((-right, left), dim=-1)
    cos, sin = cos.to(wide.dtype).unsqueeze(1), sin.to(wide.dtype).unsqueeze(1)
    return torch.cat((rotated * cos + turned * sin, rest), dim=-1).to(x.dtype)


def _rounded(x: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    """[num_tokens, kv_heads, dim] as a cache of that dtype keeps it, in the dtype of `_indexable`."""
    if dtype != torch.float8_e4m3fn:
        return x.to(dtype)
    wide = _wide(x) if scale is None else _wide(x) / scale[:, None]
    largest = torch.finfo(dtype).max
    return wide.clamp(-largest, largest).to(dtype).view(torch.uint8)


def _indexable(cache: Tensor) -> Tensor:
    """The cache, in a dtype that torch indexes on every device."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


def _context(cache: Tensor, block_ids: Tensor, begin: int, end: int, scale: Tensor | None) -> Tensor:
    """Keys or values [begin, end) of one sequence: [end - begin, kv_heads, dim]."""
    block_size = cache.shape[1]
    positions = torch.arange(begin, end, device=cache.device)
    context = _indexable(cache)[block_ids[positions // block_size].long(), positions % block_size].view(cache.dtype)
    return context if scale is None else context.float() * scale[:, None]


def _visible(first_position: int, first_key: int, end: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys [first_key, end) the queries [first_position, end) see: bool [queries, keys]."""
    query_positions = torch.arange(first_position, end, device=device)[:, None]
    key_positions = torch.arange(first_key, end, device=device)
    visible = key_positions <= query_positions
    return visible if window is None else visible & (key_positions > query_positions - window)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One sequence: [queries, heads, k_dim] over [keys, kv_heads, dim] gives [queries, heads, v_dim]."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    queries, heads, _ = query.shape
    groups = heads // key.shape[1]
    key = key.to(dtype).repeat_interleave(groups, dim=1)
    value = value.to(dtype).repeat_interleave(groups, dim=1)
    logits = torch.einsum("qhd,khd->hqk", query.to(dtype), key) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        logits = torch.cat([logits, sinks.to(dtype)[:, None, None].expand(heads, queries, 1)], dim=-1)
    weights = logits.softmax(dim=-1)[..., : key.shape[0]]
    return torch.einsum("hqk,khd->qhd", weights, value).to(query.dtype)
