"""Build the demo model: tokenizer, target, and a draft distilled from the target. Runs on a CPU.

    python -m relevo.demo.train --out build/demo --minutes 34 --threads 1

Without `--target-steps` and `--draft-steps` the schedule follows the clock, so that the run ends in time; with both,
the result depends on the seed and the versions only.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from relevo.demo.batches import Stream, held_out_windows, make_streams, sample_batch
from relevo.demo.corpus import build_corpus
from relevo.demo.evaluate import compare, held_out_loss
from relevo.demo.muon import Muon
from relevo.demo.tokenizer import TURN_END, VOCAB_SIZE, train_tokenizer

MAX_POSITIONS = 2048
TOKENS_PER_STEP = 2048
SHORT_CONTEXT = 512
LONG_PHASE = 0.88  # from this share of a run on, windows are MAX_POSITIONS long
WARM_UP, DECAY_FROM = 0.02, 0.4
TARGET_SHARE = 0.72  # of the time
ADAM_RATE, MUON_RATE = 3e-3, 0.02
LOG_EVERY = 50

LossFunction = Callable[[LlamaForCausalLM, Tensor], Tensor]


@dataclass(frozen=True)
class Budget:
    """A run's length, in steps if they are given, else in seconds."""

    seconds: float
    steps: int | None

    def progress(self) -> Iterator[float]:
        """For each step, the share of the run that lies behind, in [0, 1)."""
        started = time.monotonic()
        step = 0
        while True:
            share = (time.monotonic() - started) / self.seconds if self.steps is None else step / self.steps
            if share >= 1:
                return
            yield share
            step += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that gets target/, draft/ and report.json")
    parser.add_argument("--minutes", type=float, default=34.0, help="of training, both models together")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target-steps", type=int, help="instead of a share of --minutes")
    parser.add_argument("--draft-steps", type=int, help="instead of a share of --minutes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    corpus = build_corpus(held_out=False, seed=args.seed)
    tokenizer = train_tokenizer(corpus, MAX_POSITIONS)
    streams = make_streams(corpus, tokenizer)
    unseen = make_streams(build_corpus(held_out=True, seed=args.seed), tokenizer)
    windows = held_out_windows(unseen, context=SHORT_CONTEXT, limit=8)
    print({kind: len(stream.tokens) for kind, stream in streams.items()}, flush=True)

    seconds = args.minutes * 60
    target = make_model(tokenizer, hidden=256, intermediate=704, layers=3, heads=4, head_dim=64)
    budget = Budget(seconds * TARGET_SHARE, args.target_steps)
    target_curve = train(target, next_token_loss, streams, windows, budget, random.Random(args.seed))
    save(target, tokenizer, args.out / "target")

    draft = make_model(tokenizer, hidden=128, intermediate=352, layers=2, heads=4, head_dim=32)
    budget = Budget(seconds * (1 - TARGET_SHARE), args.draft_steps)
    draft_curve = train(draft, distillation_loss(target), streams, windows, budget, random.Random(args.seed + 1))
    save(draft, tokenizer, args.out / "draft")

    held_out = {
        context: compare(target, draft, held_out_windows(unseen, context=context, limit=2**15 // context))
        for context in (SHORT_CONTEXT, MAX_POSITIONS)
    }
    report = {"target": target_curve, "draft": draft_curve, "held_out": held_out}
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")


def make_model(
    tokenizer: PreTrainedTokenizerFast, *, hidden: int, intermediate: int, layers: int, heads: int, head_dim: int
) -> LlamaForCausalLM:
    """A fresh Llama with tied embeddings and two query heads to a key head."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=head_dim,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        **ids,
    )
    model = LlamaForCausalLM(config)
    end_of_turn = tokenizer.convert_tokens_to_ids(TURN_END)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=[tokenizer.eos_token_id, end_of_turn], do_sample=True, temperature=0.7, top_p=0.95, **ids
    )
    return model


def next_token_loss(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    """Mean cross entropy in nats. batch: [rows, context + 1]"""
    logits = model(batch[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def distillation_loss(target: LlamaForCausalLM) -> LossFunction:
    """Mean KL(target || draft) in nats."""

    def loss(draft: LlamaForCausalLM, batch: Tensor) -> Tensor:
        with torch.no_grad():
            expected = target(batch[:, :-1], use_cache=False).logits.flatten(0, 1).log_softmax(-1)
        logits = draft(batch[:, :-1], use_cache=False).logits.flatten(0, 1)
        return F.kl_div(logits.log_softmax(-1), expected, log_target=True, reduction="batchmean")

    return loss


def train(
    model: LlamaForCausalLM,
    loss_function: LossFunction,
    streams: dict[str, Stream],
    windows: dict[str, Tensor],
    budget: Budget,
    rng: random.Random,
) -> list[dict[str, float]]:
    """Train in place; returns the loss curve: step, mean train loss since the last row, held-out loss, seconds."""
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon, adam = Muon(hidden), torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)
    curve: list[dict[str, float]] = []
    losses: list[float] = []
    started = time.monotonic()

    def log(step: int) -> None:
        row = {"step": step, "train": sum(losses) / len(losses), "held_out": held_out_loss(model, windows)}
        curve.append(row | {"seconds": time.monotonic() - started})
        print(" ".join(f"{key} {value:.4g}" for key, value in curve[-1].items()), flush=True)
        losses.clear()

    step = 0
    for step, share in enumerate(budget.progress(), start=1):
        context = SHORT_CONTEXT if share < LONG_PHASE else MAX_POSITIONS
        batch = sample_batch(streams, rng, batch_size=TOKENS_PER_STEP // context, context=context)
        loss = loss_function(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        rate = schedule(share)
        adam.param_groups[0]["lr"] = ADAM_RATE * rate
        adam.step()
        adam.zero_grad()
        muon.step(MUON_RATE * rate)
        if step % LOG_EVERY == 0:
            log(step)
    if losses:
        log(step)
    return curve


def schedule(share: float) -> float:
    """Learning rate as a share of its peak: a short warm-up, a plateau, a linear decay to zero."""
    return min(1.0, (share + 1e-3) / WARM_UP, (1 - share) / (1 - DECAY_FROM))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save in bfloat16; the model stays rounded to it, so that later figures are those of what was saved."""
    model.bfloat16()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.float()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
