"""What a machine allows for a model: each weight multiplied once a step, each key and value read once, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from relevo.bench.ceiling import DTYPES, GemmSpeed, Machine
from relevo.core.errors import InvalidRequest, StartupError
from relevo.model_files import ModelFiles

# Typed in part, so that a strict checker gets less from their annotations than from none.
_auto_config: Any = AutoConfig
_auto_model: Any = AutoModelForCausalLM


@dataclass(frozen=True, slots=True)
class ModelCost:
    """num_weights: that every token is multiplied with; num_head_weights: that only a token to be sampled is
    kv_elements: of keys and values of one token; attention_flops: of one query with one key, all layers together
    """

    name: str
    num_weights: int
    num_head_weights: int
    kv_elements: int
    attention_flops: int


@dataclass(frozen=True, slots=True)
class Ceiling:
    """dtype: of weights and activations, a key of ceiling.DTYPES; keys and values have it too, except int8: float32."""

    machine: Machine
    model: ModelCost
    dtype: str

    def ttft_ms(self, input_len: int) -> float:
        """A prompt alone, all of it in one step."""
        gemm = self.machine.seconds_per_weight(self.dtype, input_len)
        attention = self.model.attention_flops * input_len**2 / 2 * gemm / (2 * input_len)
        head = self.machine.seconds_per_weight(self.dtype, 1) * self.model.num_head_weights
        return 1e3 * (gemm * self.model.num_weights + attention + head)

    def tpot_ms(self, concurrency: int, context_len: float) -> float:
        """A step of one token for each of `concurrency` sequences, which are `context_len` tokens long on average."""
        weights = self.model.num_weights + self.model.num_head_weights
        kv_dtype = torch.float32 if self.dtype == "int8" else DTYPES[self.dtype]
        kv_bytes = concurrency * context_len * self.model.kv_elements * kv_dtype.itemsize
        gemm = self.machine.seconds_per_weight(self.dtype, concurrency)
        return 1e3 * (gemm * weights + kv_bytes / (1e9 * self.machine.read_gb_per_second))

    def tokens_per_second(self, concurrency: int, input_len: int, output_len: int) -> float:
        """Of `concurrency` clients: their prompts one after another, their answers together."""
        prefill_ms = concurrency * self.ttft_ms(input_len)
        decode_ms = output_len * self.tpot_ms(concurrency, input_len + output_len / 2)
        return 1e3 * concurrency * output_len / (prefill_ms + decode_ms)

    def as_dict(self) -> dict[str, Any]:
        return {"machine": self.machine.as_dict(), "model": asdict(self.model), "dtype": self.dtype}


def read_ceiling(path: Path) -> Ceiling:
    """What `relevo bench ceiling MODEL --json` wrote, for the first of its dtypes. Raises StartupError."""
    try:
        fields: Mapping[str, Any] = orjson.loads(path.read_bytes())
        machine = dict(fields["machine"])
        for name in ("gemms", "all"):
            machine[name] = tuple(GemmSpeed(**speed) for speed in machine[name])
        machine["missing"] = tuple(machine["missing"])
        return Ceiling(Machine(**machine), ModelCost(**fields["model"]), fields["dtype"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StartupError(f"{path} is not what `relevo bench ceiling MODEL --json` writes: {error!r}") from error


def model_cost(files: ModelFiles) -> ModelCost:
    """From config.json alone. Raises InvalidRequest for models that don't use all their weights for every token."""
    config = _auto_config.from_pretrained(files.path)
    if any(getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")):
        raise InvalidRequest(f"{files.name} is a mixture of experts: how many weights a step reads is no constant")
    with torch.device("meta"):
        module = _auto_model.from_config(config)
    head = module.get_output_embeddings().weight
    embeddings = module.get_input_embeddings().weight
    tables = {id(weight): weight.numel() for weight in (head, embeddings)}
    matrices = {id(each): each.numel() for each in module.parameters() if each.dim() >= 2}
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return ModelCost(
        name=files.name,
        num_weights=sum(count for key, count in matrices.items() if key not in tables),
        num_head_weights=head.numel(),
        kv_elements=2 * config.num_hidden_layers * kv_heads * head_dim,
        attention_flops=4 * config.num_hidden_layers * heads * head_dim,
    )
