"""What both workers are told on the command line."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from relevo.engine.config import (
    DEFAULT_GPU_MEMORY_UTILIZATION,
    AttentionBackend,
    Device,
    Dtype,
    EngineConfig,
    KVCacheDtype,
    LoadFormat,
    Quantization,
)
from services.common.config import ByteSize
from services.common.discovery.settings import FleetSettings


class WorkerSettings(FleetSettings):
    """Settings of a prefill or decode worker."""

    worker_id: str = Field(
        "",
        description="stable name, e.g. decode-0; by default the role and the port, beyond loopback the host's name too",
    )
    model: str | None = Field(None, description="Hugging Face id or local folder; by default the demo model")
    discovery: Literal["static", "redis", "dns"] = Field(
        "static", description="how routers find this worker; redis: it signs in at --redis-url; else they are told"
    )
    advertise_address: str = Field(
        "",
        description="of --discovery redis: host:port under which routers reach this worker; auto: what this host's name"
        " stands for, with --port; by default --host",
    )
    served_model_name: str | None = Field(None, description="name under which the model is known; by default --model")
    dtype: Dtype = Field("auto", description="of weights, activations and KV; auto: the checkpoint's")
    kv_cache_dtype: KVCacheDtype = Field("auto", description="of KV; auto: that of activations, fp8_e4m3: 8 bits")
    max_model_len: int | None = Field(None, ge=1, description="tokens, prompt and output; by default the model's")
    block_size: int = Field(16, ge=1, description="tokens in a KV block")
    kv_cache_memory: ByteSize | None = Field(
        None,
        ge=1,
        description="memory of the KV cache, e.g. 4GiB; by default 1GiB, on a GPU what --gpu-memory-utilization leaves",
    )
    gpu_memory_utilization: float = Field(
        DEFAULT_GPU_MEMORY_UTILIZATION,
        gt=0,
        le=1,
        description="share of a GPU's memory that this worker may take; of several on one GPU, together at most 1",
    )
    max_num_seqs: int = Field(0, ge=0, description="requests computed at the same time; 0: 64, on a GPU 256")
    max_num_batched_tokens: int = Field(0, ge=0, description="tokens computed in one step; 0: 512, on a GPU 4096")
    step_stretch: float = Field(
        2.0,
        gt=1,
        description="a step with prompts may take so many times a plain one, while others decode; inf: no limit",
    )
    load_format: LoadFormat = Field("auto", description="dummy: random weights, from config.json alone")
    seed: int = Field(0, ge=0, description="of dummy weights")
    device: Device = Field("auto", description="auto: cuda where there is one, else cpu")
    attention_backend: AttentionBackend = Field("auto", description="kernels; auto: the best installed for the device")
    passes: bool = Field(True, description="replace modules of the model by faster ones that were shown to be equal")
    quantization: Quantization = Field("none", description="of the weights; int8 reads half the bytes for each token")
    enforce_eager: bool = Field(False, description="on a GPU: no CUDA graphs for decode steps")
    async_scheduling: bool | None = Field(
        None, description="launch a step before the last one's tokens are read; by default on a GPU"
    )
    threads: int | None = Field(None, ge=1, description="that compute; by default one a core that this process has")
    turn_file: str | None = Field(
        None, description="shared by this host's workers, which then compute one at a time; by default none"
    )
    gpu_lock_dir: str | None = Field(
        None,
        description="folder shared by a GPU's workers, which start one at a time; by default where temporary files go",
    )
    kv_agent: str = Field("", description="address of this host's KV transfer agent; empty: none, no split requests")
    attach_timeout_seconds: float = Field(30.0, gt=0, description="how long start-up waits for the KV agent")
    lease_seconds: float = Field(
        15.0, gt=0.03, le=3600, description="how long a worker that hangs keeps slots at the KV agent from others"
    )
    offer_share: float = Field(
        0.05,
        ge=0,
        le=1,
        description="of a decode worker's time, for offering the blocks that it computes to the KV agent; 0: none is",
    )
    direct_kv: bool = Field(
        False,
        description="blocks of prompts go from worker to worker by NIXL where both have this option and one KV agent,"
        " from GPU to GPU; whoever reaches a worker's NIXL may read all of its cache",
    )
    max_num_waiting: int = Field(512, ge=1, description="requests queued before new ones are refused")
    handover_timeout_seconds: float = Field(
        3600.0, gt=0, description="how long a split request may wait for the prefill worker, its queue included"
    )
    transfer_timeout_seconds: float = Field(
        30.0, gt=0, description="how long KV blocks may be on their way after the first token; then they are computed"
    )

    def engine_config(self) -> EngineConfig:
        """Raises StartupError for values that can't work together."""
        return EngineConfig(
            model=self.model,
            dtype=self.dtype,
            kv_cache_dtype=self.kv_cache_dtype,
            max_model_len=self.max_model_len,
            block_size=self.block_size,
            kv_cache_memory=self.kv_cache_memory,
            gpu_memory_utilization=self.gpu_memory_utilization,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            step_stretch=self.step_stretch,
            load_format=self.load_format,
            seed=self.seed,
            device=self.device,
            attention_backend=self.attention_backend,
            passes=self.passes,
            quantization=self.quantization,
            enforce_eager=self.enforce_eager,
            async_scheduling=self.async_scheduling,
            threads=self.threads,
            turn_file=self.turn_file,
            gpu_lock_dir=self.gpu_lock_dir,
        )
