"""One try at serving a request on chosen workers; here the plain one: decode computes the prompt itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from relevo.core.errors import RelevoError, Unavailable
from relevo.core.request import FinishReason
from relevo.core.worker_load import PromptWork
from services.common.errors import error_from_proto
from services.pb import decode_pb2, messages_pb2
from services.router.connection import WorkerConnection
from services.router.generation import EndEvent, TokensEvent
from services.router.request_stream import RequestInbox, Update, WorkerCall
from services.router.timeline import Timeline, WorkerTimes

Event = TokensEvent | EndEvent

_FINISH_REASONS = {
    messages_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    messages_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}


@dataclass(frozen=True, slots=True)
class Job:
    """What an attempt needs of the request.

    time_left_ms: of its deadline now, at least 1; 0 = it has none
    stop_token_ids: the request's own, and EOS unless it is to be ignored
    """

    request: messages_pb2.GenerationRequest
    inbox: RequestInbox
    time_left_ms: Callable[[], int]
    stop_token_ids: frozenset[int]
    timeline: Timeline

    @property
    def ends_with_next_token(self) -> bool:
        return self.request.sampling.max_tokens == self.request.num_output_tokens + 1


class Attempt(Protocol):
    """Turns what workers say into events, and tells them what comes next. Never waits: the inbox's reader does."""

    def start(self) -> None:
        """Raises Unavailable if the decode worker is gone."""

    def handle(self, call: WorkerCall, update: Update | RelevoError) -> Sequence[Event]:
        """The events that follow from an item of the inbox. Raises what decode ended the request with."""

    def cancel(self) -> None:
        """At every stage that has not ended. Twice is harmless."""


class DirectAttempt:
    def __init__(self, job: Job, decode: WorkerConnection, work: PromptWork, source: str | None) -> None:
        """source: the agent at which blocks lie that decode lacks; None: it computes them."""
        self._source = source
        self._job = job
        self._decode = decode
        self._work = work
        self._call: WorkerCall | None = None
        self._times: WorkerTimes | None = None
        self._num_cached_tokens = 0
        self._prompt_logprobs: list[messages_pb2.TokenLogprobs] = []  # until the first token

    def start(self) -> None:
        command = decode_pb2.DecodeCommand(submit=decode_pb2.SubmitDecode(request=self._job.request))
        command.submit.request.timeout_ms = self._job.time_left_ms()
        if self._source is not None:
            command.submit.fetch.source_agent_address = self._source
        assert self._decode.info is not None
        self._times = self._job.timeline.at_worker("decode", self._decode.info.worker_id)
        self._call = self._decode.submit(command, self._job.inbox, self._work)

    def handle(self, call: WorkerCall, update: Update | RelevoError) -> Sequence[Event]:
        if isinstance(update, RelevoError):
            raise update
        assert isinstance(update, decode_pb2.DecodeUpdate)
        assert self._times is not None
        note_decode(self._times, update)
        if update.HasField("accepted"):
            assert self._decode.info is not None
            self._num_cached_tokens = update.accepted.num_cached_blocks * self._decode.info.block_size
        elif update.HasField("ended"):  # with what it took from an agent
            self._num_cached_tokens = max(self._num_cached_tokens, update.ended.num_cached_tokens)
        elif update.HasField("prompt_logprobs"):
            self._prompt_logprobs += update.prompt_logprobs.logprobs
        elif update.HasField("tokens") and self._prompt_logprobs:
            event = tokens_event(update.tokens, self._num_cached_tokens)
            logprobs, self._prompt_logprobs = self._prompt_logprobs, []
            return (replace(event, prompt_logprobs=logprobs),)
        return decode_events(update, self._num_cached_tokens)

    def cancel(self) -> None:
        if self._call is not None:
            self._call.cancel()


def note_decode(times: WorkerTimes, update: decode_pb2.DecodeUpdate) -> None:
    """What decode tells of itself."""
    if update.HasField("tokens"):
        note_tokens(times, update.tokens)
    elif update.HasField("ended"):
        note_ended(times, update.ended)


def note_tokens(times: WorkerTimes, tokens: messages_pb2.Tokens) -> None:
    if tokens.HasField("stages"):
        times.tell(tokens.stages)


def note_ended(times: WorkerTimes, ended: messages_pb2.Ended) -> None:
    times.ended_at = time.perf_counter()
    if ended.HasField("stages"):
        times.tell(ended.stages)


def decode_events(update: decode_pb2.DecodeUpdate, num_cached_tokens: int) -> Sequence[Event]:
    """num_cached_tokens: what the events will say of the prompt."""
    match update.WhichOneof("update"):
        case "tokens":
            return (tokens_event(update.tokens, num_cached_tokens),)
        case "ended":
            return (end_event(update.ended, num_cached_tokens),)
    return ()


def tokens_event(tokens: messages_pb2.Tokens, num_cached_tokens: int) -> TokensEvent:
    return TokensEvent(tokens.token_ids, tokens.logprobs, num_cached_tokens)


def end_event(ended: messages_pb2.Ended, num_cached_tokens: int) -> EndEvent:
    """Raises the error if the request ended with one; Unavailable if the worker gave it up."""
    if ended.WhichOneof("end") == "error":
        raise error_from_proto(ended.error)
    reason = _FINISH_REASONS.get(ended.finish_reason)
    if reason is None:  # CANCELLED, and it was not us: the worker is going down
        raise Unavailable("the worker gave the request up")
    return EndEvent(reason, num_cached_tokens)
