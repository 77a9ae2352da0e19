"""Random weights for a model of which only the shape matters: benchmarks, and tests of large shapes."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
import torch
from torch import Tensor, nn

STD = 0.02
# A prime: rows of a matrix, whatever their length, begin at different places of the pool.
POOL_SIZE = 4_194_301


def dummy_state_dict(skeleton: nn.Module, seed: int) -> dict[str, Tensor]:
    """Weights for every parameter and buffer of `skeleton`'s state dict, in its dtypes; tied ones once.

    Vectors: ones where they are weights (of norms), zeros otherwise (biases). All else is cut from one pool of
    N(0, STD²) at a place that the parameter's name decides: the same on every machine, at the speed of a copy.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    pool = torch.from_numpy(generator.standard_normal(POOL_SIZE, dtype=np.float32)) * STD
    pools: dict[torch.dtype, Tensor] = {}
    weights: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in skeleton.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if tensor.dim() >= 2 and tensor.is_floating_point():
            if tensor.dtype not in pools:
                pools[tensor.dtype] = pool.to(tensor.dtype)
            weights[name] = _cut(pools[tensor.dtype], tensor.shape, _offset(name))
        else:
            value = 1 if name.endswith("weight") else 0
            weights[name] = torch.full(tensor.shape, value, dtype=tensor.dtype)
    return weights


def _cut(pool: Tensor, shape: torch.Size, offset: int) -> Tensor:
    """The pool from `offset`, round and round."""
    result = torch.empty(shape, dtype=pool.dtype)
    flat = result.view(-1)
    done = 0
    while done < flat.numel():
        begin = (offset + done) % POOL_SIZE
        size = min(POOL_SIZE - begin, flat.numel() - done)
        flat[done : done + size] = pool[begin : begin + size]
        done += size
    return result


def _offset(name: str) -> int:
    return int.from_bytes(sha256(name.encode()).digest()[:8], "little") % POOL_SIZE
