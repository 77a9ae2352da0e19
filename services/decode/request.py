"""One request on a decode worker, from its submit command to its end."""

from __future__ import annotations

import asyncio
import logging

from relevo.core.errors import InvalidRequest, Mismatch, RelevoError
from relevo.engine.beams import EndedBeams
from relevo.engine.step_result import Chunk, Computed, EndedRequest, NewTokens, PromptLogprobs, Reserved
from services.common.telemetry import enter_trace, trace_id_of
from services.decode.intake import Intake
from services.decode.stages import DecodeStages
from services.pb.decode_pb2 import Accepted, DecodeCommand, DecodeUpdate, SubmitDecode
from services.pb.decode_pb2 import PromptLogprobs as PromptLogprobsMessage
from services.worker.deadline import Deadline
from services.worker.messages import beam_parts, failed, finished, logprobs_to_pb, sampling_from_pb, tokens_to_pb
from services.worker.ports import Admitted, Event
from services.worker.receiving import BlockReceiver
from services.worker.session import Reply
from services.worker.worker import Worker

logger = logging.getLogger(__name__)


class DecodeRequest:
    """Steps on the engine bring its updates; a split one first waits in a task for what prefill hands over.

    It ends with the engine's word that it has ended, which an abort brings about too. While the intake's task runs it
    may be writing into reserved blocks, so a cancel goes to the task first, and to the engine when the task is over.
    """

    def __init__(
        self,
        worker: Worker,
        receiver: BlockReceiver | None,
        submit: SubmitDecode,
        engine_id: str,
        reply: Reply[DecodeUpdate],
    ) -> None:
        message = submit.request
        is_split = submit.HasField("ticket")
        # Logits come of computing, not of KV.
        computes_all = message.sampling.HasField("prompt_logprobs")
        if is_split and (computes_all or message.sampling.num_beams):
            raise InvalidRequest("a request that is split has no prompt_logprobs and no beams", "prompt_logprobs")
        takes_in = is_split or (submit.HasField("fetch") and receiver is not None and not computes_all)
        if is_split and receiver is None:
            raise Mismatch("this decode worker has no KV agent (--kv-agent): it takes no split requests")
        self._worker = worker
        self._reply = reply
        self._name = message.request_id
        self._traceparent = message.traceparent
        self._request = worker.engine.make_request(
            engine_id,
            message.prompt_token_ids,
            sampling_from_pb(message.sampling),
            cache_salt=message.cache_salt,
            await_kv=takes_in,
            num_output_tokens=message.num_output_tokens,
            priority=message.priority,
        )
        self._stages = DecodeStages(worker, self._request)
        self._num_tokens = 0  # given here
        self._intake = None
        if takes_in and receiver is not None:
            self._intake = Intake(worker, receiver, self._request, self._stages)
        if self._intake is not None and not is_split:
            self._intake.fetch_kv(submit.fetch.source_agent_address)
            self._intake.sample_here()
        self._task: asyncio.Task[None] | None = None
        self._num_taken_in_tokens = 0
        self._is_stopping = False
        self._error: RelevoError | None = None
        worker.register(engine_id, self)
        self._deadline = Deadline(message.timeout_ms, self.cancel)
        worker.submit(self._request)
        self._log("submitted as %s, %d tokens, split: %s", engine_id, len(message.prompt_token_ids), is_split)

    def command(self, command: DecodeCommand) -> None:
        kind = command.WhichOneof("command")
        if kind == "cancel":
            self.cancel()
        elif self._intake is None:
            self._log("%s is for split requests: ignored", kind)
        elif kind == "fetch_kv":
            self._intake.fetch_kv(command.fetch_kv.source_agent_address)
        elif kind == "first_token":
            self._intake.first_token(command.first_token.token_id)
        elif kind == "compute_locally":
            self._intake.compute_locally()

    def cancel(self, error: RelevoError | None = None) -> None:
        if self._is_stopping or self._reply.has_ended:
            return
        self._is_stopping = True
        self._error = error
        if self._task is not None and not self._task.done():
            self._task.cancel()  # _task_done goes on
        else:
            self._worker.thread.abort(self._request.request_id)

    def on_event(self, event: Event) -> None:
        match event:
            case PromptLogprobs():
                logprobs = PromptLogprobsMessage(logprobs=logprobs_to_pb(event.logprobs))
                self._reply.send(DecodeUpdate(handle=self._reply.handle, prompt_logprobs=logprobs))
            case EndedBeams():
                for index, beam in enumerate(event.beams):
                    for part in beam_parts(index, beam):
                        self._reply.send(DecodeUpdate(handle=self._reply.handle, beam=part))
            case NewTokens():
                self._num_tokens += len(event.token_ids)
                tokens = tokens_to_pb(event, self._stages.tokens())
                self._reply.send(DecodeUpdate(handle=self._reply.handle, tokens=tokens))
            case Chunk():
                self._stages.chunk(event)
            case Admitted() if self._intake is None:
                self._accept(self._request.num_cached_tokens)
            case Reserved() if self._intake is not None and not self._is_stopping:
                self._stages.reserved()
                self._accept(event.num_cached_tokens)
                self._task = self._worker.spawn(self._take_in(self._intake, event), f"intake {self._name}")
                self._task.add_done_callback(self._task_done)
            case EndedRequest():
                self._end(event)
            case Admitted() | Reserved() | Computed():
                pass

    async def _take_in(self, intake: Intake, reserved: Reserved) -> None:
        enter_trace(self._traceparent)
        try:
            taken_in = await intake.run(reserved)
        except RelevoError as error:
            self._error = error
        except Exception:
            logger.exception("request %s failed", self._name)
            self._error = RelevoError("internal error of the decode worker")
        else:
            self._num_taken_in_tokens = taken_in.num_computed_tokens
            self._worker.thread.resume(self._request.request_id, taken_in.num_computed_tokens, taken_in.token_ids)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or self._error is not None:
            self._is_stopping = True
            self._worker.thread.abort(self._request.request_id)

    def _accept(self, num_cached_tokens: int) -> None:
        num_cached_blocks = num_cached_tokens // self._request.block_size
        self._reply.send(
            DecodeUpdate(handle=self._reply.handle, accepted=Accepted(num_cached_blocks=num_cached_blocks))
        )

    def _end(self, ended: EndedRequest) -> None:
        self._deadline.stop()
        self._worker.unregister(self._request.request_id)
        num_cached_tokens = min(
            self._request.num_prompt_tokens, max(ended.num_cached_tokens, self._num_taken_in_tokens)
        )
        self._worker.count_prompt(self._request.num_prompt_tokens, num_cached_tokens)
        self._error = self._error or ended.error
        drafts = ended.num_draft_tokens, ended.num_accepted_tokens
        stages = self._stages.ended(self._num_tokens, *drafts)
        if self._error is None:
            self._reply.end(finished(ended.finish_reason, num_cached_tokens, stages, *drafts))
        else:
            self._reply.end(failed(self._error, num_cached_tokens, stages))
        self._log("ended: %s", ended.finish_reason.value if self._error is None else self._error.message)

    def _log(self, message: str, *values: object) -> None:
        about = {"request_id": self._name, "trace_id": trace_id_of(self._traceparent)}
        logger.debug(message, *values, extra=about)
