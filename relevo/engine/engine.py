"""The engine: requests in, steps, tokens out. One thread at a time; no I/O, no asyncio."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace

from relevo.core.block_hash import BlockHash, root_hash
from relevo.core.block_pool import BlockPool
from relevo.core.errors import InvalidRequest, RelevoError
from relevo.core.in_flight import advance, settle
from relevo.core.request import FinishReason, Request
from relevo.core.sampling_params import SamplingParams
from relevo.core.schedule import SchedulerConfig, SchedulerOutput
from relevo.core.scheduler import Scheduler
from relevo.engine.beams import BeamCandidates, BeamGroups, EndedBeams
from relevo.engine.config import EngineConfig
from relevo.engine.gpu.start import start_on
from relevo.engine.logits_processors import make_processor
from relevo.engine.parts import EngineParts, load_parts
from relevo.engine.prompt_logprobs import max_rows
from relevo.engine.rates import EngineRates
from relevo.engine.shortage import STEP_ADVICE, explain_shortage
from relevo.engine.sizing import choose_device
from relevo.engine.spec_decode.speculator import Speculator
from relevo.engine.step import Step, chunks_of, runs_ahead
from relevo.engine.step_result import EndedRequest, EngineLoad, PromptLogprobs, Reserved, StepResult
from relevo.engine.turns import Turns
from relevo.grammar.compiler import GrammarCompiler
from relevo.grammar.matcher import start_matching
from relevo.model_files import TOKENIZER_FILE
from relevo.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

COMPILING_SECONDS = 0.01  # how long a step with nothing else to do waits for grammars


class Engine:
    """Continuous batching over one model on one device. Raises StartupError if it can't be built."""

    def __init__(self, config: EngineConfig) -> None:
        device = choose_device(config.device)
        config = config.on(device.type)
        with start_on(device, config.gpu_lock_dir) as memory, explain_shortage(device, "the engine", STEP_ADVICE):
            parts = load_parts(config, device, memory)
            self.info, self.kv_cache, self.runner = parts.info, parts.kv_cache, parts.runner
            self._turns = Turns(config.turn_file) if config.turn_file and device.type == "cpu" else nullcontext()
            self._grammars = _make_grammars(parts)
            self._compiling: dict[str, Request] = {}  # submitted, and not with the scheduler yet
            self._cancelled: list[EndedRequest] = []
            self.num_copied_blocks = 0  # for beams that part
            self._may_run_ahead = device.type == "cuda" if config.async_scheduling is None else config.async_scheduling
            self._in_flight: Step | None = None
            self._settled_at = 0.0  # the last step; on the clock of time.monotonic
            self.speculator: Speculator | None = None  # to be exchanged only between requests
            self._begin(config)
            self._warm_up()
            parts.capture_graphs(config)
            self.speculator = parts.make_speculator(config)
            parts.keep_for_steps(memory)
            self._begin(config)

    def _begin(self, config: EngineConfig) -> None:
        """With nothing known, measured or cached."""
        self.scheduler = Scheduler(
            SchedulerConfig(
                config.max_num_seqs,
                config.max_num_batched_tokens,
                config.block_size,
                max_prompt_logprobs=max_rows(self.info.vocab_size),
            ),
            BlockPool(self.info.num_blocks),
        )
        self._beams = BeamGroups(self.scheduler)
        self._rates = EngineRates(config.block_size, config.step_stretch)

    def make_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        cache_salt: str = "",
        await_kv: bool = False,
        hold_blocks: bool = False,
        num_output_tokens: int = 0,
        priority: int = 0,
    ) -> Request:
        """A request that this engine can serve. Any thread. Raises InvalidRequest naming what is wrong with it.

        sampling.seed must be set; sampling.max_tokens None becomes what is left of the context.
        num_output_tokens: how many of prompt_token_ids, the last ones, are output already: of a request that comes from
        another engine
        priority: of those that wait the lowest goes first, and takes the place of higher ones that run
        A grammar is compiled from now on, in another thread; what is wrong with it ends the request.
        """
        num_prompt_tokens = len(prompt_token_ids) - num_output_tokens
        max_model_len = self.info.max_model_len
        if num_prompt_tokens <= 0:
            raise InvalidRequest("the prompt is empty", "prompt")
        if len(prompt_token_ids) >= max_model_len:
            raise InvalidRequest(
                f"the prompt has {len(prompt_token_ids)} tokens; the context of {max_model_len} takes at most one less",
                "prompt",
            )
        if min(prompt_token_ids) < 0 or max(prompt_token_ids) >= self.info.vocab_size:
            raise InvalidRequest(f"token ids must be from 0 to {self.info.vocab_size - 1}", "prompt")
        if sampling.seed is None:
            raise InvalidRequest("seed must be set where a request reaches the engine", "seed")
        for call in sampling.logits_processors:
            make_processor(call)
        room = max_model_len - num_prompt_tokens
        max_tokens = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
        if num_output_tokens >= max_tokens:
            raise InvalidRequest(f"{num_output_tokens} tokens are output already, of {max_tokens}", "max_tokens")
        stop_token_ids = frozenset(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            stop_token_ids |= frozenset(self.info.eos_token_ids)
        return Request(
            request_id=request_id,
            token_ids=list(prompt_token_ids),
            num_prompt_tokens=num_prompt_tokens,
            sampling=sampling,
            max_tokens=max_tokens,
            stop_token_ids=stop_token_ids,
            root_hash=root_hash(self.info.fingerprint, cache_salt=cache_salt),
            block_size=self.info.block_size,
            await_kv=await_kv,
            hold_blocks=hold_blocks,
            priority=priority,
            grammar=(
                start_matching(self._grammars, sampling.structured_outputs, stop_token_ids)
                if sampling.structured_outputs is not None
                else None
            ),
        )

    def submit(self, request: Request) -> None:
        if request.grammar is not None:
            self._compiling[request.request_id] = request
            return
        self.scheduler.add(request)
        if request.sampling.use_beam_search:
            self._beams.add(request)

    def resume(self, request_id: str, num_computed_tokens: int, token_ids: list[int]) -> None:
        """See Scheduler.resume. A first token sampled elsewhere never ends a request: whoever sampled it would have."""
        self.scheduler.resume(request_id, num_computed_tokens, token_ids)

    def abort(self, request_id: str) -> None:
        """End a request and free its blocks; the next step tells, if it had not ended before."""
        request = (
            self._compiling.pop(request_id, None) or self._beams.drop(request_id) or self.scheduler.abort(request_id)
        )
        if request is not None:
            self._end(request, None)

    def release(self, request_id: str) -> None:
        self.scheduler.release(request_id)

    def pin(self, names: Iterable[BlockHash]) -> dict[BlockHash, int]:
        """Keep the blocks that are here under these names from being reused, until unpin(): name → block id."""
        return self.scheduler.pin(names)

    def unpin(self, block_ids: Iterable[int]) -> None:
        self.scheduler.unpin(block_ids)

    @property
    def has_unfinished_requests(self) -> bool:
        scheduler = self.scheduler
        return bool(scheduler.waiting or scheduler.running or scheduler.waiting_for_kv or self.is_busy)

    @property
    def is_busy(self) -> bool:
        """A step now may bring something though the last one brought nothing: one is in flight, or grammars are being
        compiled.
        """
        return self._in_flight is not None or bool(self._compiling)

    def step(self) -> StepResult:
        """Schedule and compute. Where no token's choice needs the text before it, the next step is launched before
        this one's tokens are read: the device does not wait for us. Then the result is that of the step before.
        """
        self._take_compiled()
        before, self._in_flight = self._in_flight, None
        ahead = self._may_run_ahead and self.speculator is None
        ahead = ahead and runs_ahead([*self.scheduler.running, *self.scheduler.waiting])
        if before is not None and not ahead:
            return self._settle(before)  # what comes next needs its tokens
        step = self._launch(before)
        if not ahead or step.launched is None:
            return self._settle(before or step, step.output)
        step.advanced = advance(step.output)
        self._in_flight = step
        if before is not None:
            return self._settle(before, step.output)
        return self._told(StepResult(self.load()), step.output)

    def _launch(self, before: Step | None) -> Step:
        speculator = self.speculator
        began_at = time.monotonic()
        output = self.scheduler.schedule(speculator.plan(self.scheduler.running) if speculator else None)
        step = Step(output, None, chunks_of(output), began_at)
        if output.scheduled:
            with self._turns:
                if speculator:
                    step.output = output = speculator.propose(output)
                step.verified_from = time.monotonic()
                step.launched = self.runner.launch(output.scheduled, before.launched if before else None)
        return step

    def _settle(self, step: Step, scheduled: SchedulerOutput | None = None) -> StepResult:
        """Account for a step. scheduled: of the last one that was launched, if nothing was told of it yet"""
        output = step.output
        outcome = step.wait()
        ended_at = time.monotonic()
        if self.speculator and output.scheduled:
            self.speculator.learn(output.scheduled, outcome.sampled, ended_at - step.verified_from)
        token_ids = {
            name: entry.request.until_end([token.token_id for token in tokens])
            for entry in outcome.entries
            if (tokens := outcome.sampled.get(name := entry.request.request_id))
        }
        # Waiting for a turn counts: so long does a step take here. Of steps that overlap, the time between their ends.
        began_at = max(step.began_at, self._settled_at)
        self._settled_at = ended_at
        self._rates.measure(output, sum(map(len, token_ids.values())), ended_at - began_at)
        self.scheduler.prompt_limit = self._rates.prompt_limit
        if step.advanced is None:
            ended = self.scheduler.update(output, token_ids)
        else:
            ended = settle(self.scheduler, step.advanced, {name: ids[0] for name, ids in token_ids.items()})
        for name, error in outcome.failed.items():
            request = self._beams.drop(name) or self.scheduler.fail(name)
            if request is not None:  # else another hypothesis of the same search has failed before
                self._end(request, error)
        result = StepResult(
            load=EngineLoad(),
            beams=self._advance_beams(outcome.run.candidates),
            computed=step.computed(outcome.entries),
            prompt_logprobs=[PromptLogprobs(name, logprobs) for name, logprobs in outcome.run.prompt_logprobs.items()],
            tokens=outcome.new_tokens(token_ids),
            # A grammar that has failed has left nothing but the end of text.
            ended=[
                self._ended(r, r.finish_reason, r.grammar.error if r.grammar else None)
                for r in ended
                if r.finish_reason
            ],
            num_scheduled_tokens=output.num_scheduled_tokens,
            chunks=step.chunks,
            began_at=began_at,
            ended_at=ended_at,
        )
        return self._told(result, scheduled)

    def _told(self, result: StepResult, scheduled: SchedulerOutput | None) -> StepResult:
        """With all that there is to tell beside what a step has computed."""
        stored, removed = self.scheduler.pool.drain_events()
        cancelled, self._cancelled = self._cancelled, []
        beams = [self._ended(b.request, b.beams[0].finish_reason) for b in result.beams]
        output = scheduled or SchedulerOutput()
        return replace(
            result,
            load=self.load(),
            reserved=[
                Reserved(r.request_id, r.block_ids[: r.num_tokens // r.block_size], r.num_computed_tokens)
                for r in output.reserved
            ],
            admitted=[request.request_id for request in output.admitted],
            ended=cancelled + beams + result.ended,
            stored=stored,
            removed=removed,
        )

    def _advance_beams(self, candidates: dict[str, BeamCandidates]) -> list[EndedBeams]:
        if not candidates:
            return []
        self._beams.take({name: its for name, its in candidates.items() if self._beams.has(name)})
        copies, ended, failed = self._beams.advance()
        self.kv_cache.copy_blocks(copies)
        self.num_copied_blocks += len(copies)
        for request, error in failed:
            self._end(request, error)
        return ended

    def _end(self, request: Request, error: RelevoError | None) -> None:
        """Of what ends otherwise than by its tokens; the next result tells."""
        self._cancelled.append(self._ended(request, FinishReason.CANCELLED, error))

    def _take_compiled(self) -> None:
        """Give requests whose grammars are there to the scheduler; those whose grammars are wrong end."""
        for request_id, request in list(self._compiling.items()):
            grammar = request.grammar
            assert grammar is not None
            if not (grammar.is_ready or self.scheduler.running or self.scheduler.waiting):
                grammar.wait(COMPILING_SECONDS)
            if grammar.is_ready:
                del self._compiling[request_id]
                if grammar.error is None:
                    self.scheduler.add(request)
                else:
                    self._cancelled.append(EndedRequest(request_id, FinishReason.CANCELLED, 0, grammar.error))

    def load(self) -> EngineLoad:
        scheduler = self.scheduler
        waiting = [*scheduler.waiting, *self._compiling.values()]
        unfinished = [*scheduler.running, *waiting, *scheduler.waiting_for_kv.values()]
        return EngineLoad(
            num_running=len(scheduler.running) + len(scheduler.waiting_for_kv),
            num_waiting=len(waiting),
            num_waiting_tokens=sum(request.num_uncomputed_tokens for request in unfinished),
            num_free_blocks=scheduler.pool.num_free_blocks,
            prefill_tokens_per_second=self._rates.prefill_tokens_per_second,
            step_seconds=self._rates.step_times.step_seconds,
            step_seconds_per_request=self._rates.step_times.step_seconds_per_request,
            speculation=self.speculator.stats() if self.speculator else None,
        )

    def _ended(self, request: Request, reason: FinishReason, error: RelevoError | None = None) -> EndedRequest:
        num_drafted = num_accepted = 0
        if self.speculator is not None:
            if reason is not FinishReason.CANCELLED:
                self.speculator.ended(request)
            num_drafted, num_accepted = self.speculator.forget(request.request_id)
        return EndedRequest(request.request_id, reason, request.num_cached_tokens, error, num_drafted, num_accepted)

    def _warm_up(self) -> None:
        """Compute a few tokens, so that the first request doesn't pay for what is set up lazily."""
        started = time.perf_counter()
        prompt = [0] * min(2 * self.info.block_size + 1, self.info.max_model_len - 2)
        if prompt:
            self.submit(self.make_request("warm-up", prompt, SamplingParams(max_tokens=2, temperature=0.0, seed=0)))
        while self.has_unfinished_requests:
            self.step()
        logger.debug("warm-up took %.2f s", time.perf_counter() - started)


def _make_grammars(parts: EngineParts) -> GrammarCompiler:
    files, info = parts.files, parts.info
    grammars = GrammarCompiler(
        lambda: Tokenizer.from_files(files), info.eos_token_ids, vocab_size=info.vocab_size, compile_seconds=math.inf
    )
    if (files.path / TOKENIZER_FILE).is_file():  # another form would have to be converted
        grammars.prepare()
    return grammars
