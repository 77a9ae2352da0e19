"""The stages of a request on a decode worker.

    split:   decode.queue · decode.wait_kv (kv.fetch, decode.transfer_tail) · decode.queue · decode.step
    direct:  decode.queue · prefill.chunk … · decode.queue · decode.step

They are told with the tokens that end them: the router needs them for the first two tokens, and at the end.
"""

from __future__ import annotations

import time

from relevo.core.request import Request
from relevo.engine.step_result import Chunk
from services.pb import messages_pb2 as pb
from services.worker.receiving import Receiving
from services.worker.stages import Stages
from services.worker.worker import Worker


class DecodeStages:
    """has_first_token: as soon as it is given here, or has come from prefill."""

    def __init__(self, worker: Worker, request: Request) -> None:
        self.stages = Stages()
        self._worker = worker
        self._request = request
        self._waits_since: float | None = self.stages.received_at  # in the engine's queue
        self._reserved_at = self.stages.received_at
        self._has_first_token = False
        self._is_told = False  # the second token's
        self._chunk: tuple[float, float, int] | None = None  # of the step that is being told

    def reserved(self) -> None:
        self._reserved_at = now = time.monotonic()
        self.stages.add("decode.queue", self.stages.received_at, now)
        self._waits_since = None

    def received(self, receiving: Receiving, num_reused: int) -> None:
        """Blocks have come, or will not. num_reused: of the prompt's blocks, those that were in the pool."""
        num_blocks = receiving.num_contiguous
        stage = self.stages.add(
            "kv.fetch",
            receiving.began_at,
            receiving.last_arrival,
            blocks=num_blocks,
            bytes=num_blocks * self._worker.engine.info.block_bytes,
            blocks_reused=num_reused,
        )
        stage.labels["transport"] = receiving.transport

    def resumed(self, first_token_at: float | None) -> None:
        """All is there that it waited for. first_token_at: when prefill's came; None: it is sampled here."""
        now = time.monotonic()
        self.stages.add("decode.wait_kv", self._reserved_at, now)
        if first_token_at is not None:
            self._has_first_token = True
            self.stages.add("decode.transfer_tail", first_token_at, now)
        self._waits_since = now

    def chunk(self, chunk: Chunk) -> None:
        if self._is_told:
            return
        self._end_wait()
        self._end_chunk()
        self._chunk = (self._worker.step_began_at, self._worker.step_ended_at, chunk.num_tokens)

    def tokens(self) -> pb.Stages | None:
        """A step has given tokens; what is to be told with them."""
        if self._is_told:
            return None
        self._end_wait()
        if self._has_first_token:
            _, _, num_tokens = self._chunk or (0, 0, 1)
            self._chunk = None  # this very step
            self.stages.add("decode.step", self._worker.step_began_at, self._worker.step_ended_at, tokens=num_tokens)
            self._is_told = True
        else:
            self._has_first_token = True
            self._end_chunk()
            self._waits_since = self._worker.step_ended_at
        return self.stages.take()

    def ended(self, num_tokens: int, num_draft_tokens: int, num_accepted_tokens: int) -> pb.Stages:
        """num_tokens: that were given here. num_draft_tokens: by speculation; 0: none"""
        self._end_chunk()
        drafts = {"draft_tokens": num_draft_tokens, "accepted_tokens": num_accepted_tokens} if num_draft_tokens else {}
        self.stages.add(
            "decode",
            self.stages.received_at,
            time.monotonic(),
            tokens=num_tokens,
            preemptions=self._request.num_preemptions,
            **drafts,
        )
        return self.stages.take()

    def _end_wait(self) -> None:
        if self._waits_since is not None:
            self.stages.add("decode.queue", self._waits_since, max(self._waits_since, self._worker.step_began_at))
            self._waits_since = None

    def _end_chunk(self) -> None:
        if self._chunk is not None:
            began_at, ended_at, num_tokens = self._chunk
            self.stages.add("prefill.chunk", began_at, ended_at, tokens=num_tokens)
            self._chunk = None
