"""Between the wire's messages and relevo's own types."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from relevo.core.beam_search import EarlyStopping
from relevo.core.errors import RelevoError
from relevo.core.request import FinishReason
from relevo.core.sampling_params import LogitsProcessorCall, SamplingParams
from services.common.errors import error_to_proto
from services.common.structured_outputs import structured_outputs_from_proto
from services.pb import messages_pb2 as pb
from services.pb.decode_pb2 import Beam as BeamPart

if TYPE_CHECKING:
    from relevo.engine.beams import Beam
    from relevo.engine.logprobs import TokenLogprobs
    from relevo.engine.step_result import EngineLoad, NewTokens

_FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
}


_EARLY_STOPPING: dict[int, EarlyStopping] = {pb.EARLY_STOPPING_YES: True, pb.EARLY_STOPPING_NEVER: "never"}
_MAX_BEAM_TOKENS = 512  # in one message


def beam_parts(index: int, beam: Beam) -> Iterator[BeamPart]:
    """A hypothesis in messages of a bounded size."""
    for start in range(0, len(beam.token_ids), _MAX_BEAM_TOKENS):
        end = start + _MAX_BEAM_TOKENS
        logprobs = logprobs_to_pb(beam.logprobs[start:end])
        tokens = pb.Tokens(token_ids=beam.token_ids[start:end], logprobs=logprobs)
        part = BeamPart(index=index, tokens=tokens, score=beam.score)
        if end >= len(beam.token_ids):
            part.finish_reason = _FINISH_REASONS[beam.finish_reason]
        yield part


def sampling_from_pb(message: pb.SamplingParams, *, max_tokens: int | None = None) -> SamplingParams:
    """The sampling parameters; `max_tokens`, output before included, overrides the message's (and bounds min_tokens).

    Raises InvalidRequest naming the parameter.
    """
    limit = message.max_tokens if max_tokens is None else max_tokens
    return SamplingParams(
        max_tokens=limit,
        min_tokens=message.min_tokens if max_tokens is None else min(message.min_tokens, max_tokens),
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        seed=message.seed,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty,
        logit_bias=dict(message.logit_bias),
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        num_speculative_tokens=(message.num_speculative_tokens if message.HasField("num_speculative_tokens") else None),
        allowed_token_ids=tuple(message.allowed_token_ids) or None,
        bad_words_token_ids=tuple(tuple(word.token_ids) for word in message.bad_words),
        logprob_token_ids=tuple(message.logprob_token_ids),
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        use_beam_search=message.num_beams > 0,
        n=message.num_answers or 1,
        best_of=message.num_beams or None,
        length_penalty=message.length_penalty,
        logits_processors=tuple(LogitsProcessorCall(each.name, each.arguments) for each in message.logits_processors),
        early_stopping=_EARLY_STOPPING.get(message.early_stopping, False),
        structured_outputs=structured_outputs_from_proto(message),
    )


def tokens_to_pb(tokens: NewTokens, stages: pb.Stages | None = None) -> pb.Tokens:
    return pb.Tokens(token_ids=tokens.token_ids, logprobs=logprobs_to_pb(tokens.logprobs), stages=stages)


def finished(
    reason: FinishReason,
    num_cached_tokens: int,
    stages: pb.Stages | None = None,
    num_draft_tokens: int = 0,
    num_accepted_tokens: int = 0,
) -> pb.Ended:
    return pb.Ended(
        finish_reason=_FINISH_REASONS[reason],
        num_cached_tokens=num_cached_tokens,
        num_draft_tokens=num_draft_tokens,
        num_accepted_tokens=num_accepted_tokens,
        stages=stages,
    )


def failed(error: RelevoError, num_cached_tokens: int = 0, stages: pb.Stages | None = None) -> pb.Ended:
    return pb.Ended(error=error_to_proto(error), num_cached_tokens=num_cached_tokens, stages=stages)


def first_error(group: BaseExceptionGroup[RelevoError]) -> RelevoError:
    """One of a group's errors, for a reply that has room for one."""
    error = group.exceptions[0]
    return first_error(error) if isinstance(error, BaseExceptionGroup) else error


def load_to_pb(load: EngineLoad, transfer_bytes_per_second: float) -> pb.Load:
    return pb.Load(
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        num_waiting_tokens=load.num_waiting_tokens,
        num_free_blocks=load.num_free_blocks,
        prefill_tokens_per_second=load.prefill_tokens_per_second,
        step_seconds=load.step_seconds,
        step_seconds_per_request=load.step_seconds_per_request,
        transfer_bytes_per_second=transfer_bytes_per_second,
        spec_decode_acceptance_length=load.speculation.acceptance_length if load.speculation else 0.0,
    )


def logprobs_to_pb(logprobs: Sequence[TokenLogprobs]) -> list[pb.TokenLogprobs]:
    return [
        pb.TokenLogprobs(
            chosen=pb.Logprob(token_id=entry.chosen.token_id, logprob=entry.chosen.logprob, rank=entry.chosen.rank),
            top=[pb.Logprob(token_id=top.token_id, logprob=top.logprob, rank=top.rank) for top in entry.top],
        )
        for entry in logprobs
    ]
