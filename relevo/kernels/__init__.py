"""Attention over a paged KV cache: one module a backend, the same functions in each.

`reference` is plain torch, runs everywhere and is what the others are tested against; `cpu` is numba; `triton` is for
GPUs, and runs on a CPU only in Triton's interpreter (TRITON_INTERPRET=1, for tests); `flash-attn` and `flashinfer` are
`triton` with attention by FlashAttention 3, or of prompts by FlashInfer.
Importing this package imports neither torch nor numba nor triton; `load_backend` imports what it needs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from shutil import which
from typing import TYPE_CHECKING, Literal, Protocol, cast

from relevo.kernels.metadata import AttentionMetadata

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["BACKENDS", "Activation", "AttentionMetadata", "Kernels", "PreparedLinear", "load_backend"]

BACKENDS = ("auto", "reference", "cpu", "triton", "flash-attn", "flashinfer")

_ADD_ONS = {"flash-attn": "flash_attn_interface", "flashinfer": "flashinfer"}  # to triton: the modules that they call

Activation = Literal["silu", "gelu", "gelu_tanh"]


class PreparedLinear(Protocol):
    """One or more linear layers of the same input, laid out for a backend's product; see `Kernels.prepare_linear`.

    num_bytes: of the weights as they are kept
    """

    in_features: int
    out_features: int
    num_bytes: int

    def __call__(self, x: Tensor) -> Tensor:
        """x: [n, in_features], rows contiguous. Returns [n, out_features], x's dtype, contiguous."""
        ...


class Kernels(Protocol):
    """What every backend module offers.

    WIDENS_16_BITS: products with weights of 16 bits are as fast as with float32, whatever the CPU
    """

    WIDENS_16_BITS: bool

    def store_kv(
        self,
        key: Tensor,
        value: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> None:
        """Write a step's keys and values into the cache.

        key:          [num_tokens, kv_heads, k_dim], any strides
        value:        [num_tokens, kv_heads, v_dim], any strides
        k_cache:      [num_blocks, block_size, kv_heads, k_dim], a strided view; key is cast to its dtype
        v_cache:      [num_blocks, block_size, kv_heads, v_dim], likewise
        slot_mapping: [num_tokens] int64, block_id * block_size + offset
        k_scale:      [kv_heads] or [1] float32, of a float8_e4m3fn cache: it keeps key / k_scale, at most ±448
        v_scale:      likewise; both or neither are given. None stands for 1

        Raises IndexError for a slot outside the cache; on a GPU, where nobody waits to see it, writes nothing there.
        """
        ...

    def paged_attention(
        self,
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
        """Causal attention of a flat batch's queries over their sequences' cached keys and values.

        query:   [num_tokens, heads, k_dim], any strides; heads is a multiple of kv_heads
        k_cache: [num_blocks, block_size, kv_heads, k_dim], a strided view
        v_cache: [num_blocks, block_size, kv_heads, v_dim], a strided view
        sinks:   [heads], one logit more in each head's softmax denominator (gpt-oss)
        k_scale, v_scale: as in store_kv
        returns: [num_tokens, heads, v_dim], contiguous, query's dtype

        A query at position p sees keys [max(0, p - sliding_window + 1), p], as in transformers. Logits are
        scaled, then softcap * tanh(logits / softcap), then masked. Keys that no query sees are not read.
        """
        ...

    def prepare_linear(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], scales: Sequence[Tensor] | None = None
    ) -> PreparedLinear:
        """Make linear layers ready for products, as one: their outputs lie side by side.

        weights: each [n_i, k], of one dtype: float32, bfloat16, float16, or int8 with scales
        biases:  each [n_i] or None
        scales:  each [n_i] float32: row j stands for weights[j] * scales[j]

        The weights may be kept as they are or copied; the caller drops its own references either way.
        """
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
        """x / sqrt(mean(x²) + eps) * (weight + weight_offset) over the last dimension (Zhang & Sennrich 2019).

        x:      [..., dim], up to three dimensions, the last contiguous
        weight: [dim]
        returns: x's shape and dtype, contiguous
        """
        ...

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """(rms_norm(sum), sum) of sum = x + residual, rounded to their dtype. All [n, dim], contiguous."""
        ...

    def rotary_store_kv(
        self,
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
        """Rotate queries and keys (Su et al. 2021, halves rotated as in Llama); write keys and values into the cache.

        query, key, value, k_cache, v_cache, slot_mapping, k_scale, v_scale: as in store_kv and paged_attention
        cos, sin: [num_tokens, rot_dim], rot_dim even and at most k_dim; what lies beyond rot_dim stays as it is
        returns: the rotated query, [num_tokens, heads, k_dim], contiguous

        Raises IndexError for a slot outside the cache; on a GPU, which could only tell by waiting, the token is not
        written.
        """
        ...

    def gated_activation(self, x: Tensor, activation: Activation) -> Tensor:
        """activation(x[:, :f]) * x[:, f:]; x: [n, 2 * f], contiguous. Returns [n, f], x's dtype."""
        ...

    def argmax(self, logits: Tensor) -> Tensor:
        """[n, vocab] float32 to [n] int64; of equals the lowest id."""
        ...

    def top_k(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest of each row, descending, of equals the lowest id first. k <= vocab.

        logits:  [n, vocab] float32
        returns: values [n, k] float32, ids [n, k] int64
        """
        ...

    def mask_logits(self, logits: Tensor, rows: Tensor, masks: Tensor) -> None:
        """Set to -inf, in place, what a mask excludes.

        logits: [n, vocab] float32
        rows:   [m] int64, which rows the masks are of, none twice
        masks:  [m, ceil(vocab / 32)] int32: bit i % 32 of word i // 32 says that token i stays
        """
        ...

    def sample(
        self,
        logits: Tensor,
        temperature: Sequence[float],
        min_p: Sequence[float],
        top_k: Sequence[int],
        top_p: Sequence[float],
        uniforms: Sequence[float],
    ) -> Tensor:
        """Draw a token from each row: temperature, then min_p, top_k, top_p as in `sampling.filtered_weights`.

        logits:   [n, vocab] float32, each row's maximum finite
        uniforms: a number in [0, 1) a row, of which all of its random numbers are made; see `sampling.draw`
        the rest: one value a row; min_p 0, top_k 0 and top_p 1 leave a row as it is
        returns:  ids, [n] int64

        A row's token depends on that row alone. Probabilities may differ between backends by a few roundings.
        """
        ...

    def score(self, logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of some tokens of each row, and how many tokens are likelier.

        logits:    [n, vocab] float32
        token_ids: [n, m] int64
        returns:   log-probabilities [n, m] float32; [n] int64, how many logits exceed that of the row's first token
        """
        ...

    def apply_penalties(
        self, logits: Tensor, rows: Tensor, token_ids: Tensor, counts: Tensor, penalties: Tensor
    ) -> None:
        """Make tokens of the text so far less likely, in place: repetition, then frequency, then presence.

        logits:    [n, vocab] float32
        rows:      [t] int64, and token_ids: [t] int64: what is penalized; no pair twice
        counts:    [t] int64, how often the token is in the row's output; 0 if in its prompt only
        penalties: [n, 3] float32, each row's repetition, frequency and presence penalty (1, 0, 0: none)

        A positive logit is divided by the repetition penalty, another multiplied by it (Keskar et al. 2019, "CTRL");
        then count * frequency is taken off, and presence if there is a count.
        """
        ...

    def gather_blocks(self, storage: Tensor, block_ids: Tensor, out: Tensor) -> None:
        """Copy blocks of the cache to where they lie side by side.

        storage:   [num_blocks, block_bytes] uint8
        block_ids: [n] int32 or int64
        out:       [n, block_bytes] uint8, on storage's device

        Raises IndexError for a block outside the cache; on a GPU its row stays as it is.
        """
        ...

    def scatter_blocks(self, source: Tensor, block_ids: Tensor, storage: Tensor) -> None:
        """Copy blocks that lie side by side to their places in the cache.

        source:    [n, block_bytes] uint8, on storage's device
        block_ids: [n] int32 or int64, none twice
        storage:   [num_blocks, block_bytes] uint8

        Raises IndexError for a block outside the cache; on a GPU it is left out.
        """
        ...

    def sgmv(self, x: Tensor, a: Tensor, b: Tensor, adapters: Tensor, scale: Tensor, out: Tensor) -> None:
        """Add to each row the low-rank product of its own adapter: out[i] += scale * b @ (a @ x[i]) (Punica, S-LoRA).

        x:        [n, k], rows contiguous
        a, b:     [num_adapters, r, k] and [num_adapters, m, r]; an adapter of a lower rank has zeros behind its own
        adapters: [n] int32, each row's adapter, -1 for none
        scale:    [num_adapters] float32
        out:      [n, m], x's dtype, changed in place
        """
        ...

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile, or load from disk, whatever a first call with this dtype would wait for.

        On a GPU: what does not depend on the model. The rest is compiled when a model first runs.
        """
        ...


def load_backend(name: str, device: str) -> Kernels:
    """Import a backend by name; `auto` is `cpu` on a CPU, elsewhere the first of `flash-attn`, `flashinfer`, `triton`,
    `reference` that is installed and can run.

    Raises ValueError if the name is unknown, or names a backend that cannot run on `device`.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown kernel backend {name!r}: choose one of {', '.join(BACKENDS)}")
    on_cpu = device.partition(":")[0] == "cpu"
    if name == "auto":
        name = "cpu" if on_cpu else _best_on_gpu(device)
    if name == "cpu" and not on_cpu:
        raise ValueError(
            f"kernel backend 'cpu' cannot run on device {device!r}: choose 'triton', 'reference' or 'auto'"
        )
    if name == "triton" and on_cpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("kernel backend 'triton' needs a GPU: on a CPU choose 'cpu' or 'auto'")
    if name in _ADD_ONS and on_cpu:
        raise ValueError(f"kernel backend {name!r} needs a GPU: on a CPU choose 'cpu' or 'auto'")
    if name in _ADD_ONS and not find_spec(_ADD_ONS[name]):
        raise ValueError(f"kernel backend {name!r} needs the module {_ADD_ONS[name]}, which is not installed")
    return cast(Kernels, import_module(f"relevo.kernels.{name.replace('-', '_')}"))


def _best_on_gpu(device: str) -> str:
    if not find_spec("triton"):
        return "reference"
    if find_spec(_ADD_ONS["flash-attn"]) and _is_hopper(device):
        return "flash-attn"
    # FlashInfer compiles its kernels when they are first called, unless their binaries are installed too.
    if find_spec(_ADD_ONS["flashinfer"]) and (find_spec("flashinfer_jit_cache") or which("nvcc")):
        return "flashinfer"
    return "triton"


def _is_hopper(device: str) -> bool:
    import torch

    from relevo.kernels.flash_attn import is_hopper

    return is_hopper(torch.device(device))
