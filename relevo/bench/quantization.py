"""What quantizing the weights does to a model's next-token distributions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from relevo.engine.kv_cache import KVCache
from relevo.kernels import AttentionMetadata, Kernels
from relevo.models.attention import AttentionContext
from relevo.models.causal_lm import CausalLM
from relevo.models.layout import KVLayout


@dataclass(frozen=True, slots=True)
class QuantizationLoss:
    """Over all positions of all windows. KL: of the quantized model's distribution from the plain one's, in nats.

    agreement: share of positions where both have the same most likely token
    plain_loss, quantized_loss: mean negative log likelihood of the windows' tokens, nats a token
    """

    num_positions: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    agreement: float
    plain_loss: float
    quantized_loss: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_loss(
    plain: CausalLM, quantized: CausalLM, kernels: Kernels, windows: Sequence[Sequence[int]]
) -> QuantizationLoss:
    """windows: token ids, at least 2 each and at most the models' context."""
    divergences, agreements, plain_losses, quantized_losses = [], [], [], []
    for window in windows:
        following = torch.tensor(window[1:]).unsqueeze(1)
        p, q = (next_token_logprobs(model, kernels, window)[:-1] for model in (plain, quantized))
        divergences.append((p.exp() * (p - q)).sum(dim=-1))
        agreements.append((p.argmax(dim=-1) == q.argmax(dim=-1)).double())
        plain_losses.append(-p.gather(1, following))
        quantized_losses.append(-q.gather(1, following))
    divergence = torch.cat(divergences)
    return QuantizationLoss(
        num_positions=len(divergence),
        kl_mean=divergence.mean().item(),
        kl_p99=divergence.quantile(0.99).item(),
        kl_max=divergence.max().item(),
        agreement=torch.cat(agreements).mean().item(),
        plain_loss=torch.cat(plain_losses).mean().item(),
        quantized_loss=torch.cat(quantized_losses).mean().item(),
    )


@torch.inference_mode()
def next_token_logprobs(model: CausalLM, kernels: Kernels, token_ids: Sequence[int]) -> Tensor:
    """One sequence, from nothing: [num_tokens, vocab_size] float64."""
    count, block_size = len(token_ids), 16
    num_blocks = -(-count // block_size)
    cache = KVCache(KVLayout(model.layout_layers, model.dtype, block_size), num_blocks, torch.device("cpu"))
    metadata = AttentionMetadata(
        block_table=torch.arange(num_blocks, dtype=torch.int32).unsqueeze(0),
        slot_mapping=torch.arange(count),
        seq_lens=torch.tensor([count], dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, count], dtype=torch.int32),
        max_query_len=count,
        max_seq_len=count,
    )
    context = AttentionContext(metadata=metadata, layers=cache.layers, kernels=kernels)
    every = torch.arange(count)
    return model.forward(torch.tensor(token_ids), every, context, every).double().log_softmax(dim=-1)


def text_windows(token_ids: Sequence[int], *, length: int, count: int) -> Iterator[list[int]]:
    """At most `count` windows, spread evenly over a text; fewer if it is short."""
    whole = min(count, len(token_ids) // length)
    for index in range(whole):
        begin = index * (len(token_ids) // whole)
        yield list(token_ids[begin : begin + length])
