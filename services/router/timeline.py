"""One choice's way through the fleet: what happened to it, when, and what of it adds up to what.

Marks are taken as the request passes; spans and sums are made of them when somebody asks (docs/adr/0020).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from services.pb import messages_pb2

PROGRESS_TOKENS = 64  # every so many output tokens are an event of the trace
MAX_PROGRESS = 128  # such events

# What a stage of the way to the first token counts as. The first that claims a moment has it; what nobody claims is
# `relay`: messages between processes, and what router and workers do with them.
_TTFT_PARTS = (
    ("arrive", "arrive"),
    ("receive", "receive"),
    ("tokenize", "tokenize"),
    ("place", "place"),
    ("router.queue", "queue"),
    ("prefill.compute", "prefill"),
    ("kv.announce", "queue"),
    ("prefill.queue", "queue"),
    ("decode.queue", "queue"),
    ("kv.fetch", "fetch"),
    ("decode.wait_kv", "fetch"),
)
# The same between the first token and the second.
_GAP_PARTS = (
    ("decode.transfer_tail", "transfer_tail"),
    ("decode.step", "step"),
    ("prefill.chunk", "step"),
    ("decode.queue", "decode_wait"),
)


@dataclass(frozen=True, slots=True)
class Span:
    """Seconds, on the clock of time.perf_counter. parent: the span's place in the list, None of the first."""

    name: str
    service: str
    began_at: float
    ended_at: float
    attributes: Mapping[str, Any]
    parent: int | None = None
    instance: str = ""  # of the service: the worker's id
    events: Sequence[tuple[float, str, Mapping[str, Any]]] = ()


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that the router did. Seconds, as in Span."""

    name: str
    began_at: float
    ended_at: float
    attributes: Mapping[str, Any]
    terms: Any = None

    def about(self) -> dict[str, Any]:
        terms = asdict(self.terms) if self.terms is not None else {}
        return {**self.attributes, **{name: value for name, value in terms.items() if value is not None}}


@dataclass(slots=True, eq=False)
class WorkerTimes:
    """What one worker said of the request. sent_at: when the router gave it the request.

    kind: prefill, decode
    told: serialized Stages; as they are they would keep all of the message that they came in
    """

    kind: str
    worker_id: str
    sent_at: float
    ended_at: float | None = None
    told: list[bytes] = field(default_factory=list)
    transit_seconds: float = float("inf")  # there and back, as far as the quickest message tells

    def tell(self, stages: messages_pb2.Stages) -> None:
        now = time.perf_counter()
        self.told.append(stages.SerializeToString())
        self.transit_seconds = min(self.transit_seconds, now - self.sent_at - stages.sent_ms / 1e3)

    @property
    def received_at(self) -> float:
        """On the router's clock, when the worker received it: both ways are taken to be equally long."""
        return self.sent_at + (max(0.0, self.transit_seconds) / 2 if self.told else 0.0)

    def stages(self) -> list[tuple[str, float, float, dict[str, Any]]]:
        """name, from, to (on the router's clock), attributes"""
        zero = self.received_at
        return [
            (
                stage.name,
                zero + stage.start_ms / 1e3,
                zero + (stage.start_ms + stage.duration_ms) / 1e3,
                {**{name: _number(value) for name, value in stage.numbers.items()}, **stage.labels},
            )
            for told in self.told
            for stage in messages_pb2.Stages.FromString(told).stages
        ]


class Timeline:
    """arrived: of the HTTP request, on the clock of time.perf_counter, as all times here; earlier, if its
    X-Request-Start said so.

    first_at, second_at: when the tokens were given to the client's connection
    """

    __slots__ = (
        "arrived",
        "attributes",
        "detokenize_seconds",
        "ended_at",
        "error",
        "first_at",
        "marks",
        "num_tokens",
        "progress",
        "second_at",
        "workers",
    )

    def __init__(self, arrived: float | None = None) -> None:
        self.arrived = time.perf_counter() if arrived is None else arrived
        self.marks: list[Mark] = []
        self.workers: list[WorkerTimes] = []
        self.progress: list[tuple[float, int]] = []
        self.num_tokens = 0
        self.first_at: float | None = None
        self.second_at: float | None = None
        self.ended_at: float | None = None
        self.error: str | None = None
        self.detokenize_seconds = 0.0
        self.attributes: dict[str, Any] = {}  # of the request

    def mark(
        self, name: str, began_at: float, ended_at: float | None = None, *, terms: Any = None, **attributes: Any
    ) -> None:
        """terms: a dataclass whose fields are attributes too"""
        self.marks.append(
            Mark(name, began_at, time.perf_counter() if ended_at is None else ended_at, attributes, terms)
        )

    def at_worker(self, kind: str, worker_id: str) -> WorkerTimes:
        """The request is given to a worker now."""
        times = WorkerTimes(kind, worker_id, time.perf_counter())
        self.workers.append(times)
        return times

    def count(self, num_tokens: int) -> None:
        """Output tokens have come from a worker."""
        before, self.num_tokens = self.num_tokens, self.num_tokens + num_tokens
        if before // PROGRESS_TOKENS != self.num_tokens // PROGRESS_TOKENS and len(self.progress) < MAX_PROGRESS:
            self.progress.append((time.perf_counter(), self.num_tokens))

    def written(self) -> None:
        """Tokens are given to the client's connection now; the first two times count."""
        if self.first_at is None:
            self.first_at = time.perf_counter()
        elif self.second_at is None:
            self.second_at = time.perf_counter()

    def end(self, error: str | None = None) -> None:
        """The first end counts."""
        if self.ended_at is None:
            self.ended_at = time.perf_counter()
            self.error = error

    def timings(self) -> dict[str, float]:
        """Milliseconds a part. Those of the time to the first token add up to `ttft`, those after to `second_token`."""
        found: dict[str, float] = {}
        stages = [(mark.name, mark.began_at, mark.ended_at) for mark in self.marks]
        for worker in self.workers:
            told = worker.stages()
            # What decode does while prefill computes the prompt holds the first token up not at all.
            is_second = any(name == "decode.transfer_tail" for name, *_ in told)
            stages += [
                (name, began_at, ended_at)
                for name, began_at, ended_at, _ in told
                if not (is_second and name in ("kv.fetch", "decode.wait_kv"))
            ]
            stages += _computing(told)
            if not told:  # a worker that says nothing: all of its time
                stages.append(("prefill.compute", worker.sent_at, worker.ended_at or time.perf_counter()))
        if self.first_at is not None:
            found |= _shares(self.arrived, self.first_at, stages, _TTFT_PARTS, rest="relay")
            found["ttft"] = _ms(self.first_at - self.arrived)
            if self.second_at is not None:
                found |= _shares(self.first_at, self.second_at, stages, _GAP_PARTS, rest="step_relay")
                found["second_token"] = _ms(self.second_at - self.first_at)
        if self.ended_at is not None:
            found["total"] = _ms(self.ended_at - self.arrived)
        return found

    def spans(self) -> list[Span]:
        """The request's first, each behind its parent. A request that has not ended ends now."""
        now = time.perf_counter()
        ended_at = self.ended_at or now
        attributes = {**self.attributes, "gen_ai.usage.output_tokens": self.num_tokens}
        if self.first_at is not None:
            attributes["gen_ai.server.time_to_first_token"] = round(self.first_at - self.arrived, 6)
            if self.num_tokens > 1:
                per_token = (ended_at - self.first_at) / (self.num_tokens - 1)
                attributes["gen_ai.server.time_per_output_token"] = round(per_token, 6)
        if self.error is not None:
            attributes["error.type"] = self.error
        events: list[tuple[float, str, Mapping[str, Any]]] = []
        if self.first_at is not None:
            events.append((self.first_at, "first token", {}))
        spans = [Span("http.request", "router", self.arrived, ended_at, attributes, events=events)]
        spans += [Span(mark.name, "router", mark.began_at, mark.ended_at, mark.about(), 0) for mark in self.marks]
        for worker in self.workers:
            spans += self._worker_spans(worker, len(spans), ended_at)
        if self.detokenize_seconds and self.first_at is not None:
            # In pieces, one with each token; shown as one, where the first was.
            took = self.detokenize_seconds
            spans.append(Span("detokenize", "router", self.first_at, self.first_at + took, {"pieces": "added up"}, 0))
        return spans

    def explain(self) -> dict[str, Any]:
        """As JSON: spans, in milliseconds since the request's arrival, and timings."""
        return {
            "timings": self.timings(),
            "spans": [
                {
                    "name": span.name,
                    "service": span.service,
                    "instance": span.instance,
                    "start_ms": _ms(span.began_at - self.arrived),
                    "duration_ms": _ms(span.ended_at - span.began_at),
                    "parent": span.parent,
                    "attributes": dict(span.attributes),
                    "events": [
                        {"name": name, "at_ms": _ms(at - self.arrived), "attributes": dict(about)}
                        for at, name, about in span.events
                    ],
                }
                for span in self.spans()
            ],
        }

    def _worker_spans(self, worker: WorkerTimes, place: int, request_ended_at: float) -> list[Span]:
        stages = worker.stages()
        own = next((stage for stage in stages if stage[0] == worker.kind), None)
        ended_at = own[2] if own else worker.ended_at or request_ended_at
        attributes = own[3] if own else {}
        events: list[tuple[float, str, Mapping[str, Any]]] = []
        if worker.kind == "decode":
            events = [(at, "tokens", {"tokens": count}) for at, count in self.progress if worker.sent_at <= at]
        spans = [
            Span(worker.kind, worker.kind, worker.received_at, ended_at, attributes, 0, worker.worker_id, events),
        ]
        counts: dict[str, int] = {}
        for name, began_at, stage_ended_at, about in stages:
            if name == worker.kind:
                continue
            if name in ("prefill.chunk", "kv.seal"):
                counts[name] = counts.get(name, -1) + 1
                name = f"{name}[{counts[name]}]"
            spans.append(Span(name, worker.kind, began_at, stage_ended_at, about, place, worker.worker_id))
        return spans


def _computing(stages: Sequence[tuple[str, float, float, Any]]) -> list[tuple[str, float, float]]:
    """From the first chunk to the end of the last: also the steps between them, and what is between two steps."""
    chunks = [(began_at, ended_at) for name, began_at, ended_at, _ in stages if name == "prefill.chunk"]
    return [("prefill.compute", chunks[0][0], chunks[-1][1])] if chunks else []


def _shares(
    began_at: float,
    ended_at: float,
    stages: Iterable[tuple[str, float, float]],
    parts: Sequence[tuple[str, str]],
    *,
    rest: str,
) -> dict[str, float]:
    """Milliseconds of [began_at, ended_at) by part; they add up to all of it."""
    stages = list(stages)
    gaps = [(began_at, ended_at)]
    found = {part: 0.0 for _, part in parts}
    for name, part in parts:
        for _, low, high in (stage for stage in stages if stage[0] == name):
            left: list[tuple[float, float]] = []
            for start, stop in gaps:
                first, last = max(start, low), min(stop, high)
                if first >= last:
                    left.append((start, stop))
                    continue
                found[part] += last - first
                left += [gap for gap in ((start, first), (last, stop)) if gap[1] > gap[0]]
            gaps = left
    found[rest] = sum(stop - start for start, stop in gaps)
    return {part: _ms(seconds) for part, seconds in found.items()}


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)


def _number(value: float) -> float:
    return int(value) if value == int(value) else value
