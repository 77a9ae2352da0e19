"""Putting a speculator together: by name, with costs measured on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from relevo.core.request import Request
from relevo.core.sampling_params import SamplingParams
from relevo.core.schedule import ScheduledRequest
from relevo.demo import draft_path
from relevo.engine.config import EngineConfig
from relevo.engine.forward_pass import ForwardPass
from relevo.engine.loading import load_configured
from relevo.engine.model_runner import ModelRunner
from relevo.engine.spec_decode.draft_model import DraftModelProposer
from relevo.engine.spec_decode.ngram import NgramProposer
from relevo.engine.spec_decode.proposer import Proposer
from relevo.engine.spec_decode.row_costs import RowCosts
from relevo.engine.spec_decode.speculator import Speculator
from relevo.engine.spec_decode.suffix import SuffixProposer
from relevo.kernels import Kernels
from relevo.model_files import resolve_model
from relevo.models.causal_lm import CausalLM

MEASURED_ROWS = (1, 2, 4, 8, 16, 32, 64)
MEASURED_RUNS = 3  # the quickest counts


def load_draft_model(config: EngineConfig, kernels: Kernels, device: torch.device) -> CausalLM | None:
    """None unless the configuration names one. Raises StartupError if it can't be loaded."""
    kind, _, path = (config.speculative or "").partition(":")
    if kind != "draft":
        return None
    files = resolve_model(str(draft_path()) if path == "demo" else path, weights=config.load_format != "dummy")
    return load_configured(config, files, kernels, device)


def make_speculator(config: EngineConfig, runner: ModelRunner, draft: ForwardPass | None) -> Speculator:
    """The caches must not be in use: measuring writes into their first blocks."""
    assert config.speculative is not None
    proposer: Proposer
    propose_costs = None
    if draft is not None:
        proposer = DraftModelProposer(
            draft,
            runner.eos_token_ids,
            vocab_size=runner.model.vocab_size,
            max_rows=config.max_num_batched_tokens,
        )
        propose_costs = _measured(config, proposer.measure)
    else:
        proposer = NgramProposer() if config.speculative == "ngram" else SuffixProposer()
    return Speculator(
        proposer,
        config.max_drafts,
        _measured(config, runner.run),
        propose_costs,
        adaptive=config.adaptive_speculation,
    )


def _measured(config: EngineConfig, run: Callable[[list[ScheduledRequest]], object]) -> RowCosts:
    """Of passes over so many requests' next tokens."""
    block_size = config.block_size
    request = Request(
        request_id="costs",
        token_ids=[0] * block_size,
        num_prompt_tokens=1,
        sampling=SamplingParams(max_tokens=None, temperature=0.0, seed=0),
        max_tokens=2 * block_size,
        stop_token_ids=frozenset(),
        root_hash=bytes(32),
        block_size=block_size,
        num_computed_tokens=block_size - 1,
        block_ids=[0],
    )
    limit = max(2, min(config.max_num_batched_tokens, config.max_num_seqs * (1 + config.max_drafts)))
    seconds = {}
    for rows in MEASURED_ROWS:
        if rows > limit:
            break
        entries = [ScheduledRequest(request, 1, num_draft_slots=1)] * rows
        times = []
        for _ in range(MEASURED_RUNS + 1):
            started = time.perf_counter()
            run(entries)
            times.append(time.perf_counter() - started)
        seconds[rows] = min(times[1:])
    return RowCosts(seconds)
