"""All passes over a model, in their order."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from relevo.kernels import Kernels
from relevo.models.passes.attention import FusedAttentionPass
from relevo.models.passes.compare import NotApplied
from relevo.models.passes.decoder import FusedModelPass
from relevo.models.passes.gated_mlp import GatedMLPPass
from relevo.models.passes.packed_linear import PackedLinearPass
from relevo.models.passes.report import LeftAlone, PassRecord, grouped
from relevo.models.passes.rms_norm import RMSNormPass
from relevo.models.passes.target import Pass, Target
from relevo.models.passes.trace import ModelKwargs, example_inputs, trace_model
from relevo.models.quantization import Quantization

logger = logging.getLogger(__name__)

# Attention uses the norms in it; what is left of the linear layers is packed; the decoder uses all of them.
PASSES: tuple[Pass, ...] = (
    RMSNormPass(),
    FusedAttentionPass(),
    GatedMLPPass(),
    PackedLinearPass(),
    FusedModelPass(),
)


@torch.no_grad()
def apply_passes(
    model: nn.Module,
    kernels: Kernels,
    model_kwargs: ModelKwargs,
    *,
    vocab_size: int,
    max_model_len: int,
    quantization: Quantization = "none",
    passes: tuple[Pass, ...] = PASSES,
) -> tuple[nn.Module, list[PassRecord]]:
    """Returns the model to run, which is `model` or wraps it, and what was done to it; `model` is changed in place.

    Modules are replaced one at a time: of no more than one are there two copies of the weights.

    quantization: of the weights of all linear layers that are replaced
    """
    started = time.perf_counter()
    device = next(model.parameters()).device
    inputs: Mapping[str, Tensor] = example_inputs(vocab_size, max_model_len, device)
    trace = trace_model(model, kernels, model_kwargs, inputs)
    records = []
    for each in passes:
        target = Target(model, kernels, trace, model_kwargs, inputs, max_model_len, quantization)
        model, record = _apply(each, target)
        records.append(record)
        for why, modules in record.reasons():
            logger.debug("pass %s left alone %s: %s", each.name, ", ".join(grouped(modules)) or "the model", why)
    logger.info("passes: %s (%.2f s)", _summary(records), time.perf_counter() - started)
    return model, records


def _apply(each: Pass, target: Target) -> tuple[nn.Module, PassRecord]:
    record = PassRecord(each.name, each.does)
    model = target.model
    for name in list(each.candidates(target)):
        if not _exists(model, name):
            continue  # it was in a module that has just been replaced
        try:
            replacement = each.replacement(target, name)
        except NotApplied as why:
            record.left_alone.append(LeftAlone(name, str(why), why.figures))
        except Exception as error:
            # Whatever a module does that nobody foresaw: it runs as it is.
            record.left_alone.append(LeftAlone(name, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"))
        else:
            record.applied.append(name)
            if name:
                model.set_submodule(name, replacement)
            else:
                model = replacement
    return model, record


def _exists(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _summary(records: list[PassRecord]) -> str:
    return ", ".join(f"{record.name} on {len(record.applied)}" for record in records)
