"""Finds out what KV a model keeps by running it once; refuses by name the models that paged attention cannot serve."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from relevo.core.block_hash import LayerShape
from relevo.core.errors import StartupError
from relevo.models.attention import Attention, MaskFunction, described_mask

# One token shows nothing of a neighbour's influence; a short convolution, or a compression of four keys, shows in five.
NUM_TOKENS = 5
# What modules pass to their attention beyond what Attention.attend names, and what needs no doing about it.
_IGNORED_TENSORS = frozenset({"position_ids", "logits_to_keep"})


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """One layer's attention as the model called it."""

    layer_idx: int
    heads: int
    shape: LayerShape
    scale: float
    sliding_window: int | None
    softcap: float | None
    has_sinks: bool


@dataclass(frozen=True, slots=True)
class Probe:
    """layers: one entry a decoder layer, in order; vocab_size: rows of the logits."""

    layers: tuple[LayerAttention, ...]
    vocab_size: int


def unsupported(model: nn.Module, why: str) -> StartupError:
    return StartupError(f"architecture {type(model).__name__} is not supported: {why}")


def probe_model(
    model: nn.Module,
    num_layers: int,
    max_model_len: int,
    model_kwargs: Callable[[Attention], Mapping[str, Any]],
    *,
    check_masks: bool = True,
) -> Probe:
    """Run a few tokens through a model loaded under PROBED, with an attention that takes notes and gives zeros.

    model_kwargs: the keywords through which an attention reaches the model's modules
    check_masks: False where an adapter, not the model, says what is masked

    Raises StartupError unless every decoder layer calls attention exactly once, in order; all of it is causal, at most
    with a window; nothing but attention lets one token influence another; and positions are those that it is given.
    """
    device = next(model.parameters()).device
    recorder = _Recorder(max_model_len, check_masks)
    # Three rows: as it is, with another first token, and at other positions.
    input_ids = torch.ones((3, NUM_TOKENS), dtype=torch.int64, device=device)
    input_ids[1, 0] = 2
    positions = torch.arange(NUM_TOKENS, device=device).repeat(3, 1)
    positions[2] += 3
    try:
        with torch.inference_mode():
            output = model(
                input_ids=input_ids,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=torch.tensor([NUM_TOKENS - 1], device=device),
                **model_kwargs(recorder),
            )
            recorder.compare(output.logits[:, 0])
    except _Refused as refused:
        raise unsupported(model, str(refused)) from None
    except Exception as error:
        # Whatever it is that this architecture wants and does not get here, it cannot be served.
        first_line = str(error).strip().partition("\n")[0]
        raise unsupported(model, f"running it ends in {type(error).__name__}: {first_line}") from error
    found = [layer.layer_idx for layer in recorder.layers]
    if found != list(range(num_layers)):
        raise unsupported(model, _difference(found, num_layers))
    if recorder.mixes_tokens:
        raise unsupported(model, "tokens influence one another outside of its attention")
    if not recorder.uses_positions:
        raise unsupported(model, "it does not use the positions that it is given")
    return Probe(tuple(recorder.layers), output.logits.shape[-1])


class _Refused(Exception):
    """Why, as the rest of a sentence."""


@dataclass
class _Recorder:
    """Stands in for AttentionContext; attends to nothing."""

    max_model_len: int
    check_masks: bool
    layers: list[LayerAttention] = field(default_factory=list)
    mixes_tokens: bool = False
    uses_positions: bool = False
    _seen: set[tuple[MaskFunction, int | None]] = field(default_factory=set)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        layer_idx: int,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        name = type(module).__name__
        unknown = [k for k, given in kwargs.items() if isinstance(given, Tensor) and k not in _IGNORED_TENSORS]
        if unknown:
            raise _Refused(f"{name} gives its attention {unknown[0]}, which paged attention has no use for")
        if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
            raise _Refused(f"{name} is not causal")
        if query.shape[2] != NUM_TOKENS or key.shape[2] != NUM_TOKENS or key.shape[0] != query.shape[0]:
            raise _Refused(f"{name} attends to something other than its own sequence")
        if self.check_masks:
            self._check_mask(name, described_mask(attention_mask), sliding_window)
        for tensor in (query, key, value):
            self.compare(tensor[:, :, 1:])
        self.layers.append(
            LayerAttention(
                layer_idx=layer_idx,
                heads=query.shape[1],
                shape=LayerShape(key.shape[1], key.shape[3], value.shape[3]),
                scale=scale,
                sliding_window=sliding_window,
                softcap=softcap,
                has_sinks=sinks is not None,
            )
        )
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3])

    def compare(self, values: Tensor) -> None:
        """values: [3, ...], of any tokens but the first; see the rows in probe_model."""
        plain, other_first, moved = values.float()
        scale = plain.abs().max().item()
        # Equal to the bit, but for the order in which experts' tokens come.
        if not torch.allclose(plain, other_first, rtol=0.0, atol=0.01 * scale):
            self.mixes_tokens = True
        if not torch.allclose(plain, moved, rtol=0.0, atol=1e-4 * scale):
            self.uses_positions = True

    def _check_mask(self, name: str, mask: MaskFunction | None, window: int | None) -> None:
        if mask is None:
            raise _Refused(f"{name} does not use the attention mask that transformers makes for it")
        if (mask, window) in self._seen:
            return
        last = self.max_model_len - 1
        borders = (0, 1, 2) if window is None else (0, 1, 2, window - 1, window, window + 1)
        for position in sorted({min(position, last) for position in (*borders, last)}):
            keys = torch.arange(min(position + 2, self.max_model_len))
            zero = torch.zeros((), dtype=torch.int64)
            visible = mask(zero, zero, torch.tensor(position), keys).expand(keys.shape)
            expected = keys <= position
            if window is not None:
                expected &= keys > position - window
            if not torch.equal(visible, expected):
                raise _Refused(f"{name} masks keys in another way than causally with one window")
        self._seen.add((mask, window))


def _difference(found: list[int], num_layers: int) -> str:
    missing = sorted(set(range(num_layers)) - set(found))
    if len(missing) == num_layers:
        return "its attention is none that paged attention could replace"
    if missing:
        shown = ", ".join(map(str, missing[:4])) + (", …" if len(missing) > 4 else "")
        return (
            f"{len(missing)} of its {num_layers} layers have no attention over a KV cache of their own (layers {shown})"
        )
    return f"its {num_layers} layers call attention {len(found)} times, or not in order"
