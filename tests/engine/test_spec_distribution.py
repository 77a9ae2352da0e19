"""Speculative sampling has the target's distribution: a chi-squared test over 1e5 draws, bonus tokens among them."""

from __future__ import annotations

import pytest
import torch

from relevo.core.sampling_params import SamplingParams
from relevo.engine.sampler import SampledToken, Sampler
from relevo.engine.spec_decode.verification import accept, sampling_rows
from relevo.kernels import load_backend
from tests.support.builders import make_request
from tests.support.statistics import chi_squared_pvalue

VOCAB, K, SEEDS = 6, 3, 33_400  # three tokens and more a seed: over 1e5 draws
PARAMETERS = {"temperature": 0.9, "top_p": 0.95}  # penalties are in test_spec_decode, token by token


def target_logits(token_ids: list[int]) -> torch.Tensor:
    """A model whose next token depends on the last two."""
    generator = torch.Generator().manual_seed(token_ids[-1] + VOCAB * token_ids[-2])
    return torch.randn(VOCAB, generator=generator) * 1.5


@pytest.mark.parametrize("draft_by", ["same numbers", "greedy", "nonsense"])
def test_output_has_the_targets_distribution(draft_by: str) -> None:
    """Of pairs of tokens behind one prompt, K drafts and a bonus token: two steps' tokens against exact odds.

    Chi-squared at p = 1e-4 for each of three ways to draft: a false alarm in 3,300 choices of seeds. Seeds are fixed.
    """
    sampler = Sampler(VOCAB, "cpu", load_backend("cpu", "cpu"))
    cache: dict[tuple[int, int], torch.Tensor] = {}

    def logits_of(token_ids: list[int], wrong: float = 0.0) -> torch.Tensor:
        key = (token_ids[-2], token_ids[-1])
        if key not in cache:
            cache[key] = target_logits(token_ids)
        return cache[key] + wrong * cache[key].flip(0)

    requests = [make_request(f"r{seed}", [2, 3], max_tokens=99) for seed in range(SEEDS)]
    for seed, request in enumerate(requests):
        request.sampling = SamplingParams(max_tokens=99, seed=seed, **PARAMETERS)  # type: ignore[arg-type]
    num_drawn = num_accepted = 0
    while pending := [request for request in requests if request.num_output_tokens < 2]:
        drafts: list[list[int]] = [[] for _ in pending]
        for depth in range(K):
            if draft_by == "nonsense":
                for at, each in enumerate(drafts):
                    each.append((at + depth) % VOCAB)
                continue
            logits = torch.stack([logits_of(r.token_ids + d, 0.4) for r, d in zip(pending, drafts, strict=True)])
            if draft_by == "greedy":
                guesses = logits.argmax(-1).tolist()
            else:
                rows = [sampling_rows(r, d, ())[-1] for r, d in zip(pending, drafts, strict=True)]
                guesses = [t.token_id for t in sampler.sample(logits, rows) if isinstance(t, SampledToken)]
            for each, guess in zip(drafts, guesses, strict=True):
                each.append(guess)
        rows = [row for r, d in zip(pending, drafts, strict=True) for row in sampling_rows(r, d, ())]
        drawn = sampler.sample(torch.stack([logits_of(list(row.token_ids)) for row in rows]), rows)
        for at, (request, each) in enumerate(zip(pending, drafts, strict=True)):
            taken = accept(each, drawn[at * (K + 1) : (at + 1) * (K + 1)])
            assert isinstance(taken, list)
            request.token_ids += [token.token_id for token in taken]
            num_drawn += len(taken)
            num_accepted += len(taken) - 1
    assert num_accepted > 0.1 * num_drawn
    counts = torch.zeros(VOCAB, VOCAB)
    for request in requests:
        first, second = request.output_token_ids[:2]
        counts[first, second] += 1
    expected = exact_pairs() * SEEDS
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert chi_squared_pvalue(counts[possible], expected[possible]) > 1e-4


def exact_pairs() -> torch.Tensor:
    """Odds of the first two tokens, by plain arithmetic."""
    first = odds([2, 3])
    pairs = torch.zeros(VOCAB, VOCAB, dtype=torch.float64)
    for token_id in range(VOCAB):
        pairs[token_id] = first[token_id] * odds([2, 3, token_id])
    return pairs


def odds(token_ids: list[int]) -> torch.Tensor:
    p = (target_logits(token_ids).double() / 0.9).softmax(-1)
    kept = torch.zeros(VOCAB, dtype=torch.bool)
    held = 0.0
    for token_id in p.argsort(descending=True).tolist():
        kept[token_id] = True
        held += float(p[token_id])
        if held >= 0.95:
            break
    p = torch.where(kept, p, 0.0)
    return p / p.sum()
