"""Figures of the demo model on text that it was not trained on."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, windows: dict[str, Tensor]) -> float:
    """Mean cross entropy over all windows, in nats a token. windows: kind -> [rows, context + 1]"""
    total, count = 0.0, 0
    for rows in windows.values():
        for row in rows.unsqueeze(1).unbind():
            logits = model(row[:, :-1], use_cache=False).logits[0]
            total += F.cross_entropy(logits, row[0, 1:], reduction="sum").item()
            count += row.shape[1] - 1
    return total / count


@torch.no_grad()
def compare(
    target: LlamaForCausalLM, draft: LlamaForCausalLM, windows: dict[str, Tensor]
) -> dict[str, dict[str, float]]:
    """Both models' losses and how well they agree, by kind of text.

    agreement:  share of positions whose most likely token is the same
    acceptance: mean of sum(min(p, q)), the odds that a token drawn from the draft (q) is accepted (p) at temperature 1
    """
    figures = {}
    for kind, rows in windows.items():
        sums = dict.fromkeys(("target_loss", "draft_loss", "agreement", "acceptance"), 0.0)
        for row in rows.unsqueeze(1).unbind():
            p = target(row[:, :-1], use_cache=False).logits[0].softmax(-1)
            q = draft(row[:, :-1], use_cache=False).logits[0].softmax(-1)
            sums["target_loss"] += F.nll_loss(p.log(), row[0, 1:], reduction="sum").item()
            sums["draft_loss"] += F.nll_loss(q.log(), row[0, 1:], reduction="sum").item()
            sums["agreement"] += (p.argmax(-1) == q.argmax(-1)).sum().item()
            sums["acceptance"] += torch.minimum(p, q).sum().item()
        positions = rows.shape[0] * (rows.shape[1] - 1)
        figures[kind] = {name: value / positions for name, value in sums.items()} | {"positions": positions}
    return figures
