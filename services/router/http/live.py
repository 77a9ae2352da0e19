"""The router and its fleet as they are now, for whoever watches: one snapshot for all of them, and a stream of it.

However many watch, a second costs one look at the fleet; and one sample is taken every second, so that who comes sees
the last five minutes. A viewer that reads slowly is not sent what it has missed, and cut off by the limits on clients.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from relevo.core.errors import Exhausted, Unavailable
from services.common.loop_lag import LoopLag
from services.router.history import History, describe_request

if TYPE_CHECKING:
    from services.router.http.serving import Serving

INTERVAL_SECONDS = 1.0
FRESH_SECONDS = 0.5  # a snapshot is good for everybody who asks so soon after
MAX_REQUESTS = 50
MAX_VIEWERS = 256

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class LiveView:
    """lag: of the loop that it all runs in; None: not measured."""

    def __init__(self, lag: LoopLag | None = None) -> None:
        self.history = History()
        self.num_viewers = 0
        self.is_over = False
        self._lag = lag
        self._serving: Serving | None = None
        self._started_at = time.time()
        self._building = asyncio.Lock()
        self._snapshot: bytes = b""
        self._built_at = float("-inf")
        self._agents: dict[
            str, tuple[float, int, int]
        ] = {}  # when, and how many blocks were sealed and fetched by then
        self._rates: dict[str, Mapping[str, float]] = {}
        self.tick = asyncio.Event()  # set when there is a new snapshot; replaced by a new one at the same time

    def attach(self, serving: Serving) -> None:
        """Whom it shows. Before anything else is called."""
        self._serving = serving

    async def run(self, stopping: asyncio.Event) -> None:
        """A sample every second, and a snapshot if somebody watches. At the end every stream ends."""
        assert self._serving is not None
        try:
            while not stopping.is_set():
                serving = self._serving
                self.history.sample(
                    serving.dispatcher.records(),
                    running=serving.admission.num_running,
                    queued=serving.admission.num_queued,
                )
                if self.num_viewers:
                    await self.snapshot()
                    self._tell()
                try:
                    async with asyncio.timeout(INTERVAL_SECONDS):
                        await stopping.wait()
                except TimeoutError:
                    pass
        finally:
            self.is_over = True
            self._tell()

    async def snapshot(self) -> bytes:
        """JSON, of less than FRESH_SECONDS ago."""
        async with self._building:
            now = time.monotonic()
            if now - self._built_at >= FRESH_SECONDS:
                self._snapshot = orjson.dumps(await self._describe())
                self._built_at = now
        return self._snapshot

    def history_json(self) -> bytes:
        return orjson.dumps([asdict(sample) for sample in self.history.samples])

    async def _describe(self) -> Mapping[str, Any]:
        serving = self._serving
        assert serving is not None
        fleet = await serving.dispatcher.describe_fleet()
        samples = self.history.samples
        model = serving.dispatcher.model()
        records = reversed(list(serving.dispatcher.records()))
        return {
            "at": round(time.time(), 3),
            "router": {
                "version": serving.config.version,
                "models": serving.config.served_model_names,
                "max_model_len": None if model is None else model.max_model_len,
                "vocab_size": None if model is None else model.vocab_size,
                "started_at": round(self._started_at, 3),
                "ready": serving.dispatcher.is_ready(),
                "trouble": serving.dispatcher.warning() or (serving.dispatcher.complaint() or None),
                "num_running": serving.admission.num_running,
                "num_queued": serving.admission.num_queued,
                "max_queued": serving.admission.limits.max_queued,
                "loop_lag_ms": None if self._lag is None else round(1e3 * self._lag.worst_seconds, 2),
                "num_viewers": self.num_viewers,
            },
            "workers": [{**worker, "flow": self.history.flow(worker["address"])} for worker in fleet["workers"]],
            "agents": [{**agent, "flow": self._agent_rates(agent)} for agent in fleet["agents"]],
            "requests": [describe_request(record) for record in islice(records, MAX_REQUESTS)],
            "sample": asdict(samples[-1]) if samples else None,
        }

    def _agent_rates(self, agent: Mapping[str, Any]) -> Mapping[str, float] | None:
        """Bytes a second into and out of an agent's arena since the last snapshot; None: not known yet."""
        address, slots = agent["address"], agent["slots"]
        if slots is None:
            self._agents.pop(address, None)
            return None
        now, counts = time.monotonic(), (agent["num_blocks_sealed"], agent["num_blocks_fetched"])
        before = self._agents.get(address)
        self._agents[address] = (now, *counts)
        if before is None or counts < before[1:] or now - before[0] > 10 * INTERVAL_SECONDS:
            return None  # it was started anew, or nobody has looked for long
        scale = slots["slot_bytes"] / max(now - before[0], 1e-3)
        return {
            "in_bytes_per_second": round((counts[0] - before[1]) * scale),
            "out_bytes_per_second": round((counts[1] - before[2]) * scale),
        }

    def _tell(self) -> None:
        self.tick.set()
        self.tick = asyncio.Event()


class LiveResponse(Response):
    """Server-sent events: `history` once, then `fleet` every second, until the client leaves or the router stops."""

    def __init__(self, live: LiveView) -> None:
        """Raises Exhausted if too many watch already, Unavailable if it is over."""
        super().__init__()
        if live.is_over:
            raise Unavailable("the router is shutting down")
        if live.num_viewers >= MAX_VIEWERS:
            raise Exhausted(f"{MAX_VIEWERS} watch already", 5.0)
        self._live = live

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._live.num_viewers += 1
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._send_all(send)), group.create_task(_until_left(receive))]
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    task.cancel()
        finally:
            self._live.num_viewers -= 1

    async def _send_all(self, send: Send) -> None:
        live = self._live
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        tick = live.tick
        event = b"event: history\ndata: %b\n\nevent: fleet\ndata: %b\n\n"
        event %= live.history_json(), await live.snapshot()
        while not live.is_over:
            await send(
                {"type": "http.response.body", "body": event, "more_body": True}
            )  # a slow reader holds it up here
            await tick.wait()
            tick = live.tick
            event = b"event: fleet\ndata: %b\n\n" % await live.snapshot()
        await send({"type": "http.response.body", "body": b"event: end\ndata: {}\n\n", "more_body": False})


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
