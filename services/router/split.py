"""A split request's way: decode reserves, prefill computes and hands over, decode goes on.

    decode:  Submit → Accepted            FetchKv                 FirstToken → Tokens … → Ended
    prefill:                   Submit → Announced → first token → Ended
    client:                                         first token ↗            tokens …     end

If prefill refuses, dies or fails, whenever that is, decode gets ComputeLocally and does the rest alone. A first token
that went to the client was told to decode too, so that decode does not give it again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import assert_never

from relevo.core.errors import RelevoError, Unavailable
from relevo.core.request import FinishReason
from relevo.core.worker_load import PromptWork, WorkerLoad
from services.pb import decode_pb2, messages_pb2, prefill_pb2
from services.router.attempt import (
    Event,
    Job,
    decode_events,
    end_event,
    note_decode,
    note_ended,
    note_tokens,
    tokens_event,
)
from services.router.connection import WorkerConnection
from services.router.generation import EndEvent
from services.router.request_stream import Update, WorkerCall
from services.router.timeline import WorkerTimes

logger = logging.getLogger(__name__)


class SplitAttempt:
    """See the module. The decode worker's failures are raised, the prefill worker's are got over."""

    def __init__(
        self,
        job: Job,
        decode: WorkerConnection,
        prefill: WorkerConnection,
        work: PromptWork,
        source: tuple[str, int] | None,
    ) -> None:
        """work: the prefill worker's. source: the agent from which it takes leading blocks, and how many; or None."""
        assert decode.info is not None
        assert prefill.info is not None
        self._job = job
        self._decode = decode
        self._prefill = prefill
        self._work = work
        self._source = source
        self._block_size = decode.info.block_size
        self._ticket = messages_pb2.Ticket(
            prefill_worker_id=prefill.info.worker_id, decode_worker_id=decode.info.worker_id
        )
        self._decode_call: WorkerCall | None = None
        self._prefill_call: WorkerCall | None = None
        self._decode_times: WorkerTimes | None = None
        self._prefill_times: WorkerTimes | None = None
        self._plan: WorkerLoad[messages_pb2.Load] | None = None  # where this counts before it is submitted
        self._awaits_prefill = False  # submitted there, and neither Ended nor given up
        self._first_token_id: int | None = None
        self._num_cached_tokens = 0  # at decode, or at prefill if that is more
        # While prefill has not said whether the first token was the last: decode's updates wait here. There are few:
        # decode starts when the last block was sealed, which is when prefill says it.
        self._held: list[decode_pb2.DecodeUpdate] = []

    def start(self) -> None:
        # Decode first: nothing is computed for a request that has nowhere to go.
        command = decode_pb2.DecodeCommand(
            submit=decode_pb2.SubmitDecode(request=self._job.request, ticket=self._ticket)
        )
        command.submit.request.timeout_ms = self._job.time_left_ms()
        # Its blocks are not expected there: another prompt would not wait for their transfer, but compute them.
        work = replace(self._work, num_uncached_tokens=0, hashes=())
        self._decode_times = self._job.timeline.at_worker("decode", self._ticket.decode_worker_id)
        self._decode_call = self._decode.submit(command, self._job.inbox, work)
        # Prefill gets it when decode has accepted. Those that are placed until then must know that it will.
        self._plan = self._prefill.load
        self._plan.sent(self, self._work, asyncio.get_running_loop().time())

    def handle(self, call: WorkerCall, update: Update | RelevoError) -> Sequence[Event]:
        if isinstance(update, RelevoError):
            if call is self._decode_call:
                raise update
            return self._go_on_without_prefill(update)
        if isinstance(update, decode_pb2.DecodeUpdate):
            return self._on_decode(update)
        if isinstance(update, prefill_pb2.PrefillUpdate):
            return self._on_prefill(update)
        assert_never(update)

    def cancel(self) -> None:
        self._end_plan()
        for call in (self._decode_call, self._prefill_call):
            if call is not None:
                call.cancel()

    def _on_decode(self, update: decode_pb2.DecodeUpdate) -> Sequence[Event]:
        assert self._decode_times is not None
        note_decode(self._decode_times, update)
        kind = update.WhichOneof("update")
        if kind == "accepted":
            self._start_prefill(update.accepted.num_cached_blocks)
            return ()
        failed = kind == "ended" and update.ended.WhichOneof("end") == "error"
        if self._awaits_prefill and not failed:
            self._held.append(update)
            return ()
        return decode_events(update, self._num_cached_tokens)

    def _end_plan(self) -> None:
        if self._plan is not None:
            self._plan.ended(self, asyncio.get_running_loop().time())
            self._plan = None

    def _start_prefill(self, num_blocks_at_decode: int) -> None:
        self._end_plan()
        self._num_cached_tokens = num_blocks_at_decode * self._block_size
        if num_blocks_at_decode >= len(self._job.request.prompt_token_ids) // self._block_size:
            self._compute_locally()  # it has all that could be sent: the index was behind
            return
        self._ticket.num_blocks_at_decode = num_blocks_at_decode
        command = prefill_pb2.PrefillCommand(
            submit=prefill_pb2.SubmitPrefill(request=self._job.request, ticket=self._ticket)
        )
        command.submit.request.timeout_ms = self._job.time_left_ms()
        if self._source is not None:
            command.submit.source_agent_address, command.submit.num_blocks_at_source = self._source
        try:
            self._prefill_times = self._job.timeline.at_worker("prefill", self._ticket.prefill_worker_id)
            self._prefill_call = self._prefill.submit(command, self._job.inbox, self._work)
        except Unavailable as error:
            self._go_on_without_prefill(error)
        else:
            self._awaits_prefill = True

    def _on_prefill(self, update: prefill_pb2.PrefillUpdate) -> Sequence[Event]:
        assert self._prefill_times is not None
        match update.WhichOneof("update"):
            case "announced":
                fetch = decode_pb2.FetchKv(source_agent_address=update.announced.agent_address)
                self._tell_decode(decode_pb2.DecodeCommand(fetch_kv=fetch))
            case "first_token" if self._first_token_id is None:
                self._first_token_id = update.first_token.token_ids[0]
                note_tokens(self._prefill_times, update.first_token)
                first = decode_pb2.FirstToken(token_id=self._first_token_id)
                self._tell_decode(decode_pb2.DecodeCommand(first_token=first))
                return (tokens_event(update.first_token, self._num_cached_tokens),)
            case "ended":
                note_ended(self._prefill_times, update.ended)
                return self._on_prefill_ended(update.ended)
        return ()

    def _on_prefill_ended(self, ended: messages_pb2.Ended) -> Sequence[Event]:
        try:
            end = end_event(ended, max(self._num_cached_tokens, ended.num_cached_tokens))
        except RelevoError as error:
            return self._go_on_without_prefill(error)
        if self._first_token_id is None:
            return self._go_on_without_prefill(Unavailable("it ended the request without a first token"))
        self._num_cached_tokens = end.num_cached_tokens
        # LENGTH means that more may follow, unless one token was all that was asked for.
        if ended.finish_reason == messages_pb2.FINISH_REASON_STOP or self._job.ends_with_next_token:
            return (end,)
        return self._release_held()

    def _go_on_without_prefill(self, error: RelevoError) -> Sequence[Event]:
        logger.warning(
            "prefill worker %s is out, decode computes the rest: %s",
            self._ticket.prefill_worker_id,
            error.message,
            extra={"request_id": self._job.request.request_id},
        )
        if self._prefill_call is not None:
            self._prefill_call.cancel()
        if self._first_token_id is not None:
            # Decode takes it that a token from elsewhere did not end the request: prefill would have said so.
            if self._first_token_id in self._job.stop_token_ids:
                return (EndEvent(FinishReason.STOP, self._num_cached_tokens),)
            if self._job.ends_with_next_token:
                return (EndEvent(FinishReason.LENGTH, self._num_cached_tokens),)
        self._compute_locally()
        return self._release_held()

    def _compute_locally(self) -> None:
        self._tell_decode(decode_pb2.DecodeCommand(compute_locally=decode_pb2.ComputeLocally()))

    def _release_held(self) -> Sequence[Event]:
        self._awaits_prefill = False
        held, self._held = self._held, []
        return [event for update in held for event in decode_events(update, self._num_cached_tokens)]

    def _tell_decode(self, command: decode_pb2.DecodeCommand) -> None:
        assert self._decode_call is not None
        self._decode_call.send(command)
