"""What an engine is told, and what it says of itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from relevo.core.errors import StartupError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
LoadFormat = Literal["auto", "dummy"]
Device = Literal["auto", "cpu", "cuda"]
KVCacheDtype = Literal["auto", "fp8_e4m3"]
AttentionBackend = Literal["auto", "reference", "cpu", "triton", "flash-attn", "flashinfer"]
Quantization = Literal["none", "int8"]

DEFAULT_DRAFTS = {"draft": 5, "ngram": 10, "suffix": 10}  # those who compute nothing for a draft may try more
MAX_DRAFTS = 32
DEFAULT_KV_CACHE_MEMORY = 1 << 30  # bytes, on a CPU
DEFAULT_GPU_MEMORY_UTILIZATION = 0.9


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Raises StartupError for values that can't work together.

    model: Hugging Face id, local folder, or None for the demo model
    dtype: of weights, activations and KV; auto takes the checkpoint's
    kv_cache_dtype: fp8_e4m3 keeps KV in 8 bits, by the checkpoint's k_scale and v_scale where it has them
    max_model_len: tokens of prompt and output together; None takes the model's
    block_size: tokens in a KV block
    kv_cache_memory: bytes; None: DEFAULT_KV_CACHE_MEMORY on a CPU, on a GPU what gpu_memory_utilization leaves
    gpu_memory_utilization: the share of a GPU's memory that this engine may take: weights, steps, CUDA's own, KV cache
    max_num_seqs: requests computed at the same time; 0: 64, on a GPU 256
    max_num_batched_tokens: tokens computed in one step; 0: 512, on a GPU 4096, and never less than max_num_seqs
    step_stretch: how much longer than a step without prompts one with them may take, while others decode; inf: no limit
    load_format: dummy makes random weights from config.json alone, by `seed`
    passes: replace modules of transformers by faster ones that were shown to be equal
    quantization: of the weights, while loading; int8 halves what a decoded token has to read
    speculative: None, "draft:PATH" (a model; "draft:demo": the bundled one), "ngram" or "suffix"
    num_speculative_tokens: drafts a step and request, at most; None: DEFAULT_DRAFTS
    adaptive_speculation: drafts only where they are expected to pay
    threads: that compute on a CPU; None: as many as there are cores for this process
    turn_file: shared by the engines of a host that compute one at a time, each with all cores; see Turns
    enforce_eager: no CUDA graphs: every kernel is launched in every step
    async_scheduling: launch a step before the tokens of the one before it are read; None: on a GPU
    gpu_lock_dir: folder shared by the engines of a GPU, which start one at a time; None: where temporary files go
    """

    model: str | None = None
    dtype: Dtype = "auto"
    kv_cache_dtype: KVCacheDtype = "auto"
    max_model_len: int | None = None
    block_size: int = 16
    kv_cache_memory: int | None = None
    gpu_memory_utilization: float = DEFAULT_GPU_MEMORY_UTILIZATION
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0
    step_stretch: float = 2.0
    load_format: LoadFormat = "auto"
    seed: int = 0
    device: Device = "auto"
    attention_backend: AttentionBackend = "auto"
    passes: bool = True
    quantization: Quantization = "none"
    speculative: str | None = None
    num_speculative_tokens: int | None = None
    adaptive_speculation: bool = True
    threads: int | None = None
    turn_file: str | None = None
    enforce_eager: bool = False
    async_scheduling: bool | None = None
    gpu_lock_dir: str | None = None

    def __post_init__(self) -> None:
        for name in (
            "block_size",
            "kv_cache_memory",
            "max_model_len",
            "num_speculative_tokens",
            "threads",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise StartupError(f"{name} must be at least 1, not {value}")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise StartupError(
                f"gpu_memory_utilization must be above 0 and at most 1, not {self.gpu_memory_utilization}"
            )
        if not self.step_stretch > 1.0:
            raise StartupError(f"step_stretch must be above 1, not {self.step_stretch}")
        if self.max_num_seqs < 0 or self.max_num_batched_tokens < 0:
            raise StartupError("max_num_seqs and max_num_batched_tokens must be at least 1, or 0 for the device's own")
        if 0 < self.max_num_batched_tokens < self.max_num_seqs:
            raise StartupError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): every running request computes a token a step"
            )
        if self.speculative is not None:
            check_speculative(self.speculative)
        elif self.num_speculative_tokens is not None:
            raise StartupError("num_speculative_tokens says nothing without speculative: choose who makes the drafts")
        if (self.num_speculative_tokens or 0) > MAX_DRAFTS:
            raise StartupError(
                f"num_speculative_tokens must be at most {MAX_DRAFTS}, not {self.num_speculative_tokens}"
            )

    def on(self, device_type: str) -> EngineConfig:
        """With the device's own sizes of a step in the place of those that are not given."""
        num_seqs, num_tokens = (256, 4096) if device_type == "cuda" else (64, 512)
        num_seqs = self.max_num_seqs or min(num_seqs, self.max_num_batched_tokens or num_seqs)
        return replace(
            self,
            max_num_seqs=num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens or max(num_tokens, num_seqs),
        )

    @property
    def max_drafts(self) -> int:
        """A step and request."""
        if self.speculative is None:
            return 0
        return self.num_speculative_tokens or DEFAULT_DRAFTS[self.speculative.partition(":")[0]]


def check_speculative(value: str) -> None:
    """Raises StartupError if this names no proposer."""
    kind, colon, argument = value.partition(":")
    if kind not in DEFAULT_DRAFTS or (kind == "draft") != bool(argument) or (colon and not argument):
        raise StartupError(f"speculative must be draft:PATH, draft:demo, ngram or suffix, not {value!r}")


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """fingerprint: 32 bytes; engines that share it can exchange blocks."""

    model_name: str
    fingerprint: bytes
    block_size: int
    block_bytes: int
    num_blocks: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_num_seqs: int
