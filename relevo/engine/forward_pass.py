"""A model over its KV cache: a flat batch goes to the device, logits come out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from relevo.engine.batch import FlatBatch
from relevo.engine.gpu.graphs import Capture, DecodeGraphs, GraphShape
from relevo.engine.host_copies import upload
from relevo.engine.kv_cache import KVCache
from relevo.engine.shortage import GRAPH_ADVICE, explain_shortage
from relevo.kernels import Kernels
from relevo.models.attention import AttentionContext
from relevo.models.causal_lm import CausalLM

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LateTokens:
    """Tokens of a batch that only the device knows: of a step before it, which may not have got there yet.

    at:      [n] int64, which of the batch's tokens
    of:      [n] int64, which of `sampled` they are
    sampled: [m] int64, on the device
    """

    at: NDArray[np.int64]
    of: NDArray[np.int64]
    sampled: Tensor


class ForwardPass:
    """graphs: where there are any, they compute the batches that fit them."""

    def __init__(self, model: CausalLM, kv_cache: KVCache, kernels: Kernels) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.kernels = kernels
        self.device = kv_cache.storage.device
        self.graphs: DecodeGraphs | None = None

    def capture_graphs(self, capture: Capture, shapes: Sequence[GraphShape], max_model_len: int) -> None:
        """See DecodeGraphs. Where the model can't be captured there is a warning, and there are no graphs. Raises
        OutOfMemory where there is no room for them.
        """
        try:
            with explain_shortage(self.device, "CUDA graphs", GRAPH_ADVICE):
                graphs = DecodeGraphs(self.model, self.kv_cache, self.kernels, shapes, max_model_len)
                graphs.capture(capture)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            logger.warning(
                "no CUDA graphs, so that every kernel is launched in every step, which is slower: %s", reason
            )
            return
        self.graphs = graphs

    def __call__(self, batch: FlatBatch, late: LateTokens | None = None) -> Tensor:
        """Logits, [len(batch.logits_indices), vocab_size] float32, until the next call. Waits for nothing."""
        if self.graphs is not None and self.graphs.takes(batch):
            token_ids = self.graphs.fill(batch)
            self._put_in(late, token_ids)
            return self.graphs.replay(batch)
        token_ids, positions, logits_indices, *rest = upload(batch.arrays, self.device)
        self._put_in(late, token_ids)
        context = AttentionContext(batch.metadata(*rest), self.kv_cache.layers, self.kernels)
        return self.model.forward(token_ids, positions, context, logits_indices)

    def _put_in(self, late: LateTokens | None, token_ids: Tensor) -> None:
        if late is not None:
            at, of = upload([late.at, late.of], self.device)
            token_ids.index_copy_(0, at, late.sampled.index_select(0, of))
