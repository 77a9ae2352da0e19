"""One request on a prefill worker, from its submit command to its end."""

from __future__ import annotations

import asyncio
import logging
import time

from relevo.core.block_hash import BlockHash
from relevo.core.errors import InvalidRequest, RelevoError
from relevo.core.request import FinishReason
from relevo.engine.step_result import Chunk, Computed, EndedRequest, NewTokens, PromptLogprobs, Reserved
from services.common.telemetry import enter_trace, trace_id_of
from services.kvtransfer.client import KvAgentClient
from services.pb.messages_pb2 import Ended
from services.pb.prefill_pb2 import Announced, PrefillCommand, PrefillUpdate, SubmitPrefill
from services.prefill.handover import Handover, HandoverPorts, Source, open_handover
from services.worker.deadline import Deadline
from services.worker.messages import failed, finished, first_error, sampling_from_pb, tokens_to_pb
from services.worker.ports import Admitted, Event
from services.worker.receiving import BlockReceiver
from services.worker.session import Reply
from services.worker.stages import Stages
from services.worker.worker import Worker

logger = logging.getLogger(__name__)


class PrefillRequest:
    """A task walks a request through its stages: announce, compute, hand over, end. Steps on the engine wake it.

    The engine keeps the request's blocks from its first step until release(), because the task copies out of them.
    So a cancel goes to the task first, and to the engine when the task is over.
    """

    def __init__(
        self,
        worker: Worker,
        agent: KvAgentClient,
        receiver: BlockReceiver,
        submit: SubmitPrefill,
        engine_id: str,
        reply: Reply[PrefillUpdate],
    ) -> None:
        message = submit.request
        self._stages = Stages()
        self._waits_since: float | None = None  # in the engine's queue
        self._worker = worker
        self._ports = HandoverPorts(
            agent, worker.engine.kv_cache, worker.copier, worker.transfers, worker.settings.lease_seconds
        )
        self._source = Source(submit.source_agent_address, submit.num_blocks_at_source)
        self._receiver = receiver
        self._reply = reply
        self._name = message.request_id
        self._traceparent = message.traceparent
        self._request = worker.engine.make_request(
            engine_id,
            message.prompt_token_ids,
            sampling_from_pb(message.sampling, max_tokens=message.num_output_tokens + 1),
            cache_salt=message.cache_salt,
            hold_blocks=True,
            num_output_tokens=message.num_output_tokens,
        )
        self._num_tokens = len(message.prompt_token_ids)
        self._num_blocks = self._num_tokens // self._request.block_size
        self._num_blocks_at_decode = submit.ticket.num_blocks_at_decode
        if self._num_blocks_at_decode > self._num_blocks:
            raise InvalidRequest(
                f"num_blocks_at_decode must be at most the prompt's {self._num_blocks} full blocks, "
                f"not {self._num_blocks_at_decode}",
                "num_blocks_at_decode",
            )
        self._reserved: asyncio.Future[Reserved] = asyncio.get_running_loop().create_future()
        self._changed = asyncio.Event()  # _computed or _ended is new
        self._computed: Computed | None = None
        self._ended: EndedRequest | None = None
        self._is_submitted = False
        self._num_present_tokens = 0
        self._is_cancelled = False
        self._is_aborted = False
        self._error: RelevoError | None = None
        worker.register(engine_id, self)
        self._deadline = Deadline(message.timeout_ms, self.cancel)
        self._task = worker.spawn(self._run(), f"prefill {self._name}")
        self._task.add_done_callback(self._task_done)
        self._log("accepted as %s, %d tokens", engine_id, self._num_tokens)

    def command(self, command: PrefillCommand) -> None:
        if command.WhichOneof("command") == "cancel":
            self.cancel()

    def cancel(self, error: RelevoError | None = None) -> None:
        if self._is_cancelled or self._reply.has_ended:
            return
        self._is_cancelled = True
        self._error = self._error or error
        self._task.cancel()  # _task_done goes on

    def on_event(self, event: Event) -> None:
        match event:
            case NewTokens():
                first_token = tokens_to_pb(event, self._stages.take())
                self._reply.send(PrefillUpdate(handle=self._reply.handle, first_token=first_token))
            case Chunk():
                self._end_wait(self._worker.step_began_at)
                self._stages.add(
                    "prefill.chunk", self._worker.step_began_at, self._worker.step_ended_at, tokens=event.num_tokens
                )
            case Reserved():
                self._end_wait(time.monotonic())
                if not self._reserved.done():
                    self._reserved.set_result(event)
            case Computed():
                self._computed = event
                self._changed.set()
            case EndedRequest():
                self._ended = event
                self._error = self._error or event.error
                self._changed.set()
                if self._is_aborted:
                    self._end()
            case Admitted() | PromptLogprobs():
                pass

    async def _run(self) -> None:
        enter_trace(self._traceparent)
        try:
            await self._announce_and_compute()
        except* RelevoError as group:
            self._error = first_error(group)
        except* Exception:
            logger.exception("request %s failed", self._name)
            self._error = RelevoError("internal error of the prefill worker")

    async def _announce_and_compute(self) -> None:
        request = self._request
        names = request.block_hashes(self._num_tokens)
        async with open_handover(self._ports, names, self._num_blocks_at_decode, self._source) as handover:
            self._waits_since = time.monotonic()
            num_announced = len(names) - self._num_blocks_at_decode
            self._stages.add("kv.announce", self._stages.received_at, self._waits_since, blocks=num_announced)
            if not handover.is_loading:
                self._announced(handover)
            request.await_kv = handover.num_present_blocks > 0
            self._is_submitted = True
            self._worker.submit(request)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(handover.keep_alive())
                if request.await_kv:
                    await self._take_present(names[: handover.num_present_blocks], handover)
                await self._compute(handover)
                handover.stop()

    def _announced(self, handover: Handover) -> None:
        """Decode fetches from now on: every block that it lacks is there, or ours or another writer's to seal."""
        announced = Announced(agent_address=handover.agent_address)
        self._reply.send(PrefillUpdate(handle=self._reply.handle, announced=announced))

    async def _compute(self, handover: Handover) -> None:
        """Hand over what each step has computed, until the engine is through and all of it is sealed."""
        is_last = False
        while not is_last:
            await self._changed.wait()
            self._changed.clear()
            # Read before the copy: what comes while it runs sets the event again.
            is_last = self._ended is not None
            if self._computed is not None:
                num_blocks = self._computed.num_computed_tokens // self._request.block_size
                began_at = time.monotonic()
                num_sealed = await handover.hand_over(num_blocks, self._computed.block_ids)
                if num_sealed:
                    num_bytes = num_sealed * self._worker.engine.info.block_bytes
                    self._stages.add("kv.seal", began_at, time.monotonic(), blocks=num_sealed, bytes=num_bytes)

    async def _take_present(self, names: list[BlockHash], handover: Handover) -> None:
        """Blocks that our pool lacks, and an agent holds, come from there. Those that don't come are computed."""
        request = self._request
        reserved = await self._reserved
        num_blocks = reserved.num_cached_tokens // request.block_size
        # The last token is left to compute: its row has the logits of the first token.
        wanted = names[num_blocks : (self._num_tokens - 1) // request.block_size]
        if wanted:
            receiving = self._receiver.receive(wanted, reserved.block_ids[num_blocks:], self._source.agent_address)
            await receiving.run()
            stage = self._stages.add(
                "kv.fetch",
                receiving.began_at,
                time.monotonic(),
                blocks=receiving.num_contiguous,
                bytes=receiving.num_contiguous * self._worker.engine.info.block_bytes,
                blocks_reused=num_blocks,
            )
            stage.labels["transport"] = receiving.transport
            num_blocks += receiving.num_contiguous
            self._log("%d blocks taken from the agent", receiving.num_contiguous)
            if receiving.num_contiguous < len(wanted):
                await handover.claim(num_blocks)
        if handover.is_loading:
            self._announced(handover)
        self._num_present_tokens = num_blocks * request.block_size
        self._waits_since = time.monotonic()
        self._worker.thread.resume(request.request_id, self._num_present_tokens, [])

    def _task_done(self, task: asyncio.Task[None]) -> None:
        """Nobody touches the blocks any more: the engine may have them back."""
        request_id = self._request.request_id
        if not self._is_submitted:
            self._end()
        elif self._ended is not None:
            self._worker.thread.release(request_id)
            self._end()
        else:
            # The engine says when it has ended. (That the task is done does not tell who ends the request: between its
            # end and this call there may be a step that ends it by itself.)
            self._is_aborted = True
            self._worker.thread.abort(request_id)

    def _end(self) -> None:
        self._deadline.stop()
        self._worker.unregister(self._request.request_id)
        ended = self._last_word()
        self._reply.end(ended)
        self._log("ended: %s", ended)

    def _last_word(self) -> Ended:
        num_cached_tokens = max(self._ended.num_cached_tokens if self._ended else 0, self._num_present_tokens)
        self._stages.add("prefill", self._stages.received_at, time.monotonic())
        stages = self._stages.take()
        if self._error is not None:
            return failed(self._error, num_cached_tokens, stages)
        if self._is_cancelled or self._ended is None:
            return finished(FinishReason.CANCELLED, num_cached_tokens, stages)
        return finished(self._ended.finish_reason, num_cached_tokens, stages)

    def _end_wait(self, ended_at: float) -> None:
        if self._waits_since is not None:
            self._stages.add("prefill.queue", self._waits_since, max(self._waits_since, ended_at))
            self._waits_since = None

    def _log(self, message: str, *values: object) -> None:
        about = {"request_id": self._name, "trace_id": trace_id_of(self._traceparent)}
        logger.debug(message, *values, extra=about)
