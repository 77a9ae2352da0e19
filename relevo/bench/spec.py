"""Speculative decoding against plain decoding, alternately, in one engine.

Workloads: `demo` is the bundled pair on text that it was not trained on. In `shape` and `edit` the target has the shape
of a real model and random weights. Such a model says nothing that could be guessed, so its tokens are *scripted*: it
computes and samples as always, and then says what the script has. In `shape` the draft model's guesses agree with the
script at a set rate; in `edit` the script is a file of 200 lines with a few of them changed, and the prompt is the
file.
What is measured is the machinery, with that agreement; not how well some pair agrees.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import count
from statistics import median
from typing import Any

from torch import Tensor

from relevo.core.request import Request
from relevo.core.sampling_params import SamplingParams
from relevo.core.schedule import ScheduledRequest
from relevo.engine.engine import Engine
from relevo.engine.grammar_masks import Masks
from relevo.engine.logits_processing import SamplingRow
from relevo.engine.sampler import EnqueuedTokens, Sampled, SampledToken, Sampler
from relevo.engine.spec_decode.ngram import NgramProposer
from relevo.engine.spec_decode.proposer import Proposer
from relevo.engine.spec_decode.speculator import Speculator
from relevo.engine.spec_decode.suffix import SuffixProposer

FRESH: dict[str, Callable[[], Proposer]] = {"ngram": NgramProposer, "suffix": SuffixProposer}

_names = count()


@dataclass(frozen=True, slots=True)
class SpecResult:
    """Tokens a second of decoding, prompts aside: medians over the rounds.

    ratio: median over the rounds of spec by plain. accepted: drafts of those that were drafted
    """

    workload: str
    proposer: str
    concurrency: int
    temperature: float
    plain_tokens_per_second: float
    tokens_per_second: float
    ratio: float
    worst_ratio: float
    acceptance_length: float
    accepted: float
    outputs_are_equal: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Script:
    """What a scripted target says, by the last token of the prompt."""

    answers: Mapping[int, Sequence[int]]

    def token(self, request: Request | SamplingRow, position: int) -> int:
        answer = self.answers[request.token_ids[request.num_prompt_tokens - 1]]
        return answer[(position - request.num_prompt_tokens) % len(answer)]


class ScriptedSampler(Sampler):
    """Samples, and then says what the script has."""

    def __init__(self, sampler: Sampler, script: Script) -> None:
        super().__init__(sampler.vocab_size, sampler.device, sampler.kernels)
        self._script = script

    def enqueue(self, logits: Tensor, rows: Sequence[SamplingRow], masks: Masks | None = None) -> EnqueuedTokens:
        enqueued = super().enqueue(logits, rows, masks)
        said = [self._script.token(row, len(row.token_ids)) for row in rows]

        def read() -> list[Sampled]:
            return [
                replace(token, token_id=token_id) if isinstance(token, SampledToken) else token
                for token, token_id in zip(enqueued.read(), said, strict=True)
            ]

        return EnqueuedTokens(enqueued.token_ids, read)


class AgreeingProposer:
    """A proposer that does its work, and whose drafts are then right at a set rate."""

    def __init__(self, proposer: Proposer, script: Script, rate: float) -> None:
        self._proposer = proposer
        self._script = script
        self._rate = rate

    def propose(self, entries: Sequence[ScheduledRequest]) -> list[list[int]]:
        proposed = self._proposer.propose(entries)
        return [
            [self._draft(entry.request, entry.request.num_tokens + at) for at in range(len(drafts))]
            for entry, drafts in zip(entries, proposed, strict=True)
        ]

    def _draft(self, request: Request, position: int) -> int:
        token_id = self._script.token(request, position)
        agrees = random.Random(f"{request.request_id}-{position}").random() < self._rate
        return token_id if agrees else token_id ^ 1

    def lag(self, request: Request) -> int:
        return self._proposer.lag(request)

    def verified(self, entry: ScheduledRequest, num_accepted: int) -> None:
        self._proposer.verified(entry, num_accepted)

    def ended(self, request: Request) -> None:
        self._proposer.ended(request)

    def forget(self, request_id: str) -> None:
        self._proposer.forget(request_id)


@contextmanager
def scripted(engine: Engine, script: Script) -> Iterator[None]:
    sampler = engine.runner.sampler
    engine.runner.sampler = ScriptedSampler(sampler, script)
    try:
        yield
    finally:
        engine.runner.sampler = sampler


def bench_spec(
    engine: Engine,
    workload: str,
    proposers: Mapping[str, Speculator],
    prompts: Sequence[Sequence[int]],
    *,
    temperature: float,
    output_len: int,
    num_rounds: int,
) -> list[SpecResult]:
    """All prompts at once, plain and with each proposer, one after the other; once more before, unmeasured."""
    plain: list[float] = []
    rates: dict[str, list[float]] = {name: [] for name in proposers}
    before = {}
    equal = dict.fromkeys(proposers, True)
    for index in range(num_rounds + 1):
        rate, expected = _run(engine, None, prompts, temperature, output_len)
        plain.append(rate)
        for name, speculator in proposers.items():
            if name in FRESH:
                speculator.proposer = FRESH[name]()  # else it would find the answer of the round before
            if index == 1:
                before[name] = speculator.stats()
            rate, answers = _run(engine, speculator, prompts, temperature, output_len)
            rates[name].append(rate)
            equal[name] = equal[name] and answers == expected
    results = []
    for name, speculator in proposers.items():
        was, now = before[name], speculator.stats()
        num_drafts = now.num_drafts - was.num_drafts
        num_accepted = now.num_accepted_tokens - was.num_accepted_tokens
        ratios = [fast / slow for fast, slow in zip(rates[name][1:], plain[1:], strict=True)]
        results.append(
            SpecResult(
                workload=workload,
                proposer=name,
                concurrency=len(prompts),
                temperature=temperature,
                plain_tokens_per_second=median(plain[1:]),
                tokens_per_second=median(rates[name][1:]),
                ratio=median(ratios),
                worst_ratio=min(ratios),
                acceptance_length=1 + num_accepted / num_drafts if num_drafts else 0.0,
                accepted=num_accepted / max(1, now.num_draft_tokens - was.num_draft_tokens),
                outputs_are_equal=equal[name],
            )
        )
    return results


def _run(
    engine: Engine, speculator: Speculator | None, prompts: Sequence[Sequence[int]], temperature: float, output_len: int
) -> tuple[float, list[list[int]]]:
    """Tokens a second from when all requests have their first token to the last's end, and all tokens."""
    sampling = SamplingParams(max_tokens=output_len, temperature=temperature, ignore_eos=True, seed=1)
    name = next(_names)
    requests = [
        engine.make_request(f"spec-{name}-{index}", prompt, replace(sampling, seed=index))
        for index, prompt in enumerate(prompts)
    ]
    answers: dict[str, list[int]] = {request.request_id: [] for request in requests}
    engine.speculator = None
    for request in requests:
        engine.submit(request)
    while not all(answers.values()):
        for tokens in engine.step().tokens:
            answers[tokens.request_id] += tokens.token_ids
    engine.speculator = speculator
    num_before = sum(map(len, answers.values()))
    started = time.perf_counter()
    while engine.has_unfinished_requests:
        for tokens in engine.step().tokens:
            answers[tokens.request_id] += tokens.token_ids
    seconds = time.perf_counter() - started
    engine.speculator = None
    return (sum(map(len, answers.values())) - num_before) / seconds, list(answers.values())
