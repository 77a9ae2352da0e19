"""What `relevo inspect` tells about a model: its size, its KV cache, and what passes do to it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from relevo.engine.config import DEFAULT_KV_CACHE_MEMORY, EngineConfig
from relevo.engine.loading import kv_dtype, load_configured
from relevo.engine.sizing import choose_device
from relevo.engine.threads import set_num_threads
from relevo.kernels import load_backend
from relevo.model_files import resolve_model
from relevo.models.causal_lm import CausalLM
from relevo.models.layout import KVLayout
from relevo.models.passes import PassRecord, grouped


@dataclass(frozen=True, slots=True)
class LayerKind:
    """Layers that attend alike: num_layers of them, the first being first_layer."""

    first_layer: int
    num_layers: int
    heads: int
    kv_heads: int
    k_dim: int
    v_dim: int
    sliding_window: int | None
    softcap: float | None
    has_sinks: bool


@dataclass(frozen=True, slots=True)
class LeftModules:
    modules: list[str]
    why: str


@dataclass(frozen=True, slots=True)
class PassResult:
    """modules: names, numbers in ranges, "" for the whole model"""

    name: str
    does: str
    num_applied: int
    modules: list[str]
    left_alone: list[LeftModules]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """weight_bytes: by dtype, tied weights once; kv_*: bytes, over all layers; num_blocks: in kv_cache_memory

    kv_cache_memory: as it was given, or the default
    is_kv_estimated: it is what a worker's share of a GPU leaves after the weights; a step's memory still comes off
    """

    model: str
    architecture: str
    dtype: str
    device: str
    kernel_backend: str
    num_parameters: int
    weight_bytes: dict[str, int]
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_model_len: int
    layers: list[LayerKind]
    block_size: int
    kv_bytes_per_token: int
    kv_bytes_per_block: int
    kv_cache_memory: int
    is_kv_estimated: bool
    num_blocks: int
    num_tokens: int
    passes: list[PassResult]

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)


def inspect_model(config: EngineConfig) -> Inspection:
    """Load the model as a worker would, and look. Raises StartupError as loading does."""
    files = resolve_model(config.model, weights=config.load_format != "dummy")
    device = choose_device(config.device)
    set_num_threads(config.threads)
    kernels = load_backend(config.attention_backend, device.type)
    model = load_configured(config, files, kernels, device)
    layout = KVLayout(layers=model.layout_layers, dtype=kv_dtype(config, model), block_size=config.block_size)
    weight_bytes = {_name(dtype): count * dtype.itemsize for dtype, count in model.parameters.items()}
    kv_cache_memory = config.kv_cache_memory or _default_kv_memory(config, device, sum(weight_bytes.values()))
    num_blocks = kv_cache_memory // layout.block_bytes
    text_config = model.config.get_text_config()
    return Inspection(
        model=files.name,
        architecture=(model.config.architectures or [model.config.model_type])[0],
        dtype=_name(model.dtype),
        device=str(device),
        kernel_backend=kernels.__name__.rpartition(".")[2],  # type: ignore[attr-defined]  # backends are modules
        num_parameters=sum(model.parameters.values()),
        weight_bytes=weight_bytes,
        num_layers=len(model.layers),
        hidden_size=text_config.hidden_size,
        vocab_size=model.vocab_size,
        max_model_len=model.max_model_len,
        layers=_layer_kinds(model),
        block_size=config.block_size,
        kv_bytes_per_token=layout.block_bytes // config.block_size,
        kv_bytes_per_block=layout.block_bytes,
        kv_cache_memory=kv_cache_memory,
        is_kv_estimated=config.kv_cache_memory is None and device.type == "cuda",
        num_blocks=num_blocks,
        num_tokens=num_blocks * config.block_size,
        passes=[_pass_result(record) for record in model.passes],
    )


def print_inspection(found: Inspection, console: Console) -> None:
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    for name, value in _facts(found):
        facts.add_row(name, value)
    console.print(facts)
    if not found.passes:
        console.print("\nPasses are off: modules are those of transformers.")
        return
    console.print("\nPasses", style="bold")
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for each in found.passes:
        table.add_row(each.name, "does", each.does)
        table.add_row("", "applied", "\n".join(_readable(each.modules)) or "to nothing")
        for entry in each.left_alone:
            table.add_row("", "left", f"{', '.join(_readable(entry.modules))}: {entry.why}")
    console.print(table)


def _facts(found: Inspection) -> list[tuple[str, str]]:
    weights = ", ".join(f"{_size(count)} in {dtype}" for dtype, count in found.weight_bytes.items())
    block = f"{_size(found.kv_bytes_per_block)} a block"
    at_most = "at most " if found.is_kv_estimated else ""
    return [
        ("model", f"{found.model} ({found.architecture})"),
        ("parameters", f"{found.num_parameters:,}: {weights}"),
        ("shape", f"{found.num_layers} layers, hidden {found.hidden_size:,}, vocabulary {found.vocab_size:,}"),
        *(("attention", _attention(kind, found.num_layers)) for kind in found.layers),
        ("context", f"{found.max_model_len:,} tokens"),
        ("KV cache", f"{_size(found.kv_bytes_per_token)} a token, {block} of {found.block_size} tokens, {found.dtype}"),
        ("KV blocks", f"{at_most}{found.num_blocks:,} in {_size(found.kv_cache_memory)}: {found.num_tokens:,} tokens"),
        ("kernels", f"{found.kernel_backend} on {found.device}"),
    ]


def _attention(kind: LayerKind, num_layers: int) -> str:
    dims = f"{kind.k_dim}" if kind.k_dim == kind.v_dim else f"{kind.k_dim} (keys) and {kind.v_dim} (values)"
    parts = [f"{kind.heads} heads over {kind.kv_heads} of keys and values, of {dims}"]
    if kind.sliding_window is not None:
        parts.append(f"window of {kind.sliding_window}")
    if kind.softcap is not None:
        parts.append(f"soft-capped at {kind.softcap:g}")
    if kind.has_sinks:
        parts.append("sinks")
    where = "" if kind.num_layers == num_layers else f"in {kind.num_layers} of {num_layers} layers: "
    return where + ", ".join(parts)


def _default_kv_memory(config: EngineConfig, device: torch.device, weight_bytes: int) -> int:
    if device.type != "cuda":
        return DEFAULT_KV_CACHE_MEMORY
    total = torch.cuda.get_device_properties(device).total_memory
    return max(0, int(total * config.gpu_memory_utilization) - weight_bytes)


def _layer_kinds(model: CausalLM) -> list[LayerKind]:
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for layer in model.layers:
        shape = layer.shape
        key = (layer.heads, shape.kv_heads, shape.k_dim, shape.v_dim, layer.sliding_window, layer.softcap)
        kinds.setdefault((*key, layer.has_sinks), []).append(layer.layer_idx)
    return [LayerKind(indices[0], len(indices), *key) for key, indices in kinds.items()]


def _pass_result(record: PassRecord) -> PassResult:
    left = [LeftModules(grouped(modules), why) for why, modules in record.reasons()]
    return PassResult(record.name, record.does, len(record.applied), grouped(record.applied), left)


def _readable(modules: list[str]) -> list[str]:
    return [module or "the model" for module in modules]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(count: int) -> str:
    value = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.2f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")
