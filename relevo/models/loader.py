"""Loads a model through transformers, unmodified, with paged attention in place of its own."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from relevo.core.errors import StartupError
from relevo.kernels import Kernels
from relevo.model_files import ModelFiles, read_config
from relevo.models.adapters import Adapter, find_adapter
from relevo.models.attention import PAGED, PROBED, Attention, register_attention
from relevo.models.causal_lm import CausalLM
from relevo.models.checkpoint import Memory, available_memory, content_digest, weight_files
from relevo.models.dummy_weights import dummy_state_dict
from relevo.models.kv_scales import stored_kv_scales
from relevo.models.passes import PassRecord, apply_passes
from relevo.models.probe import probe_model, unsupported
from relevo.models.quantization import Quantization
from relevo.models.weight_source import one_at_a_time, stored_weights

logger = logging.getLogger(__name__)

# Typed in part, so that a strict checker gets less from their annotations than from none.
_auto_config: Any = AutoConfig
_auto_model: Any = AutoModelForCausalLM
_library_logging: Any = transformers_logging

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOAD_FORMATS = ("auto", "dummy")

# What transformers, safetensors and torch raise for files that are not what they claim to be.
_LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, ImportError)


def load_model(
    files: ModelFiles,
    *,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    load_format: str = "auto",
    seed: int = 0,
    kernels: Kernels | None = None,
    passes: bool = True,
    quantization: Quantization = "none",
) -> CausalLM:
    """Load, check and probe a model, and let passes make it faster.

    dtype: "auto" is the checkpoint's, except on a CPU: there it is bfloat16 for a checkpoint of 16 bits if the kernels
        or the CPU itself multiply by that as fast as by float32, else float32.
    load_format: "dummy" needs config.json only, and makes up weights from `seed`
    kernels: warmed up for the dtype if given, and what passes put in; without them there are no passes
    passes: False leaves the modules as transformers made them
    quantization: of the weights, by passes

    Raises StartupError in one line: architecture unknown or not supported; weights missing, incomplete or corrupt;
    not enough memory; no such device.
    """
    device = _check_device(torch.device(device))
    if load_format not in LOAD_FORMATS:
        raise StartupError(f"load_format must be one of {', '.join(LOAD_FORMATS)}, not {load_format!r}")
    if quantization != "none" and (kernels is None or not passes):
        raise StartupError(f"quantization {quantization} is done by passes, which are off")
    register_attention()
    with _quiet_transformers():
        config = _load_config(files)
        torch_dtype = choose_dtype(dtype, config, device, kernels if passes else None)
        skeleton = _skeleton(files, config, torch_dtype)
        model_class: Any = type(skeleton)
        adapter = find_adapter(model_class.__name__)
        if adapter is None and not model_class.is_backend_compatible():
            raise unsupported(skeleton, "it has no attention that transformers can swap for another")
        _check_memory(files, skeleton, torch_dtype, device)
        if load_format == "dummy":
            parts = ("dummy", f"{_config_digest(files)}-{seed}", "")
            weights: dict[str, Any] = {"state_dict": dummy_state_dict(skeleton, seed)}
            source = None
        else:
            parts = _fingerprint_parts(files, config)
            source, weights = _weight_source(files, config, skeleton)
        model = _from_pretrained(files, model_class, source, config, torch_dtype, device, adapter, weights)
        loaded = _probed(files.name, model, adapter, torch_dtype, parts, kernels, passes, quantization)
        if load_format == "dummy":
            return loaded
        return replace(loaded, kv_scales=stored_kv_scales(weight_files(files), len(loaded.layers), device))


def choose_dtype(
    dtype: str, config: PreTrainedConfig, device: torch.device, kernels: Kernels | None = None
) -> torch.dtype:
    """The dtype to load in; see `load_model`. Raises StartupError for an unknown name.

    kernels: that compute the linear layers, None if torch does
    """
    if dtype in DTYPES:
        return DTYPES[dtype]
    if dtype != "auto":
        raise StartupError(f"dtype must be one of auto, {', '.join(DTYPES)}, not {dtype!r}")
    own = config.dtype or config.get_text_config().dtype or torch.float32
    own = DTYPES[own] if isinstance(own, str) else own
    if device.type == "cpu":
        # Experts of mixtures are torch's own products, whatever the kernels.
        by_kernels = kernels is not None and kernels.WIDENS_16_BITS and not _has_experts(config)
        return torch.bfloat16 if own.itemsize == 2 and (by_kernels or _cpu_multiplies_bfloat16()) else torch.float32
    return own if own in DTYPES.values() else torch.float32


def max_positions(config: PreTrainedConfig, name: str) -> int:
    """The longest sequence that the model is made for.

    Rotary embeddings of the kind `longrope` change all frequencies, of earlier tokens too, beyond their original
    length: cached keys, and neighbours in the batch, would be wrong then. Such a model ends at that length.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 2:
        raise StartupError(f"model {name!r}: config.json does not say max_position_embeddings")
    rope = getattr(text, "rope_parameters", None) or {}
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, Mapping))]:
        original = parameters.get("original_max_position_embeddings")
        if parameters.get("rope_type") == "longrope" and isinstance(original, int):
            limit = min(limit, original)
    return limit


def _check_device(device: torch.device) -> torch.device:
    if device.type == "cuda" and not torch.cuda.is_available():
        raise StartupError(f"device {str(device)!r} is not available: torch finds no CUDA device here")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise StartupError(f"device {str(device)!r} is not available: there are {torch.cuda.device_count()}")
    if device.type not in ("cpu", "cuda"):
        raise StartupError(f"device must be cpu or cuda, not {str(device)!r}")
    return device


def _load_config(files: ModelFiles) -> PreTrainedConfig:
    given = read_config(files)
    architecture = (given.get("architectures") or [given.get("model_type")])[0]
    try:
        config: PreTrainedConfig = _auto_config.from_pretrained(
            str(files.path), local_files_only=True, trust_remote_code=False
        )
        return config
    except _LOADING_ERRORS as error:
        raise StartupError(
            f"architecture {architecture} is not supported: transformers {transformers.__version__} does not know it, "
            f"or not this config.json ({_first_line(error)})"
        ) from error


def _skeleton(files: ModelFiles, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model without memory for its weights: its class, and what there is to load."""
    name = (config.architectures or [config.model_type])[0]
    try:
        with torch.device("meta"):
            model: PreTrainedModel = _auto_model.from_config(config, dtype=dtype, trust_remote_code=False)
    except _LOADING_ERRORS as error:
        raise StartupError(
            f"architecture {name} is not supported: transformers {transformers.__version__} cannot build a causal "
            f"language model from it ({_first_line(error)})"
        ) from error
    if config.is_encoder_decoder:
        raise unsupported(model, "it is an encoder-decoder")
    if getattr(config.get_text_config(), "num_kv_shared_layers", 0):
        raise unsupported(model, "its layers share one another's KV")
    return model


def _check_memory(files: ModelFiles, skeleton: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    needed = sum(parameter.numel() * parameter.element_size() for parameter in skeleton.parameters())
    if device.type == "cuda":
        memory: Memory | None = Memory(torch.cuda.mem_get_info(device)[0], f"on {device}")
    else:
        memory = available_memory()
    if memory is not None and needed > memory.available:
        raise StartupError(
            f"model {files.name!r} does not fit: its weights take {needed / 2**30:.2f} GiB in "
            f"{str(dtype).removeprefix('torch.')}, {memory.available / 2**30:.2f} GiB {memory.where} are available"
        )


def _fingerprint_parts(files: ModelFiles, config: PreTrainedConfig) -> tuple[str, str, str]:
    weights = weight_files(files)
    quantization = getattr(config, "quantization_config", None)
    method = str(dict(quantization).get("quant_method", "unknown")) if isinstance(quantization, Mapping) else ""
    if files.revision:
        return files.name, files.revision, method
    return "local", content_digest(files, weights), method


def _config_digest(files: ModelFiles) -> str:
    return sha256(json.dumps(read_config(files), sort_keys=True).encode()).hexdigest()


def _weight_source(
    files: ModelFiles, config: PreTrainedConfig, skeleton: PreTrainedModel
) -> tuple[str | None, dict[str, Any]]:
    """Where transformers gets the weights: the tensors one by one, or the folder if only it knows what they mean."""
    paths = weight_files(files)
    if all(path.suffix == ".safetensors" for path in paths) and not hasattr(config, "quantization_config"):
        weights = stored_weights(paths, skeleton, skeleton.base_model_prefix)
        if weights is not None:
            return None, {"state_dict": weights}
    return str(files.path), {"local_files_only": True}


def _from_pretrained(
    files: ModelFiles,
    model_class: Any,
    source: str | None,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    adapter: Adapter | None,
    weights: dict[str, Any],
) -> PreTrainedModel:
    try:
        with one_at_a_time():
            model, info = model_class.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                attn_implementation=PROBED if adapter is None else "eager",
                # On a CPU: touches only the experts that the batch chose. On a GPU: one launch, deterministic.
                experts_implementation="eager" if device.type == "cpu" else "grouped_mm",
                # Straight to a GPU, which transformers leaves to accelerate; else by way of the host's memory.
                device_map=device if device.type == "cuda" and find_spec("accelerate") else None,
                output_loading_info=True,
                **weights,
            )
    except _LOADING_ERRORS as error:
        raise StartupError(f"model {files.name!r}: its weights cannot be loaded: {_first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        shown = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise StartupError(f"model {files.name!r}: the checkpoint lacks {len(missing)} of its weights: {shown}")
    ignored = sorted(info["unexpected_keys"])
    if ignored:
        logger.warning("model %s: %d weights are not used, such as %s", files.name, len(ignored), ignored[0])
    loaded: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    return loaded


def _probed(
    name: str,
    model: PreTrainedModel,
    adapter: Adapter | None,
    dtype: torch.dtype,
    fingerprint_parts: tuple[str, str, str],
    kernels: Kernels | None,
    passes: bool,
    quantization: Quantization,
) -> CausalLM:
    model_kwargs: Callable[[Attention], Mapping[str, Any]] = _by_keyword
    if adapter is not None:
        adapter.prepare(model)
        model_kwargs = adapter.model_kwargs
    limit = max_positions(model.config, name)
    num_layers: int = model.config.get_text_config().num_hidden_layers
    probe = probe_model(model, num_layers, limit, model_kwargs, check_masks=adapter is None)
    if adapter is None:
        model.set_attn_implementation(PAGED)
    if kernels is not None:
        kernels.warm_up(dtype)
    parameters: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        parameters[parameter.dtype] += parameter.numel()
    module: nn.Module = model
    records: list[PassRecord] = []
    if kernels is not None and passes:
        module, records = apply_passes(
            model,
            kernels,
            model_kwargs,
            vocab_size=probe.vocab_size,
            max_model_len=limit,
            quantization=quantization,
        )
    if quantization != "none":
        fingerprint_parts = (*fingerprint_parts[:2], quantization)
    return CausalLM(
        module=module,
        config=model.config,
        layers=probe.layers,
        dtype=dtype,
        vocab_size=probe.vocab_size,
        max_model_len=limit,
        fingerprint_parts=fingerprint_parts,
        model_kwargs=model_kwargs,
        parameters=parameters,
        passes=tuple(records),
    )


def _by_keyword(attention: Attention) -> Mapping[str, Any]:
    return {"relevo": attention}


def _has_experts(config: PreTrainedConfig) -> bool:
    text = config.get_text_config()
    return any(getattr(text, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))


def _cpu_multiplies_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no reports of transformers in a server's log; what matters of them becomes our errors."""
    verbosity = _library_logging.get_verbosity()
    bars = _library_logging.is_progress_bar_enabled()
    _library_logging.set_verbosity_error()
    _library_logging.disable_progress_bar()
    try:
        yield
    finally:
        _library_logging.set_verbosity(verbosity)
        if bars:
            _library_logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"
