"""What a timeline adds up to."""

from __future__ import annotations

import time

import pytest

from services.pb import messages_pb2
from services.router.timeline import PROGRESS_TOKENS, Timeline


def stage(name: str, start_ms: float, duration_ms: float, **numbers: float) -> messages_pb2.Stage:
    return messages_pb2.Stage(name=name, start_ms=start_ms, duration_ms=duration_ms, numbers=numbers)


def split_request() -> Timeline:
    """Given to decode 10 ms after its arrival, to prefill after 20; messages take 1 ms each way."""
    timeline = Timeline(100.0)
    timeline.mark("receive", 100.0, 100.001)
    timeline.mark("tokenize", 100.001, 100.004)
    timeline.mark("place", 100.006, 100.010)
    decode = timeline.at_worker("decode", "d0")
    prefill = timeline.at_worker("prefill", "p0")
    decode.sent_at, prefill.sent_at = 100.010, 100.020
    decode.transit_seconds = prefill.transit_seconds = 0.002
    prefill.told.append(
        messages_pb2.Stages(
            stages=[
                stage("kv.announce", 0, 2),
                stage("prefill.queue", 2, 8),
                stage("prefill.chunk", 10, 10),
                stage("prefill.chunk", 22, 8),
            ],
            sent_ms=31,
        ).SerializeToString()
    )
    timeline.first_at = 100.053
    decode.told.append(
        messages_pb2.Stages(
            stages=[
                stage("decode.queue", 0, 3),
                stage("decode.wait_kv", 3, 47),
                stage("decode.transfer_tail", 44, 6),
                stage("decode.queue", 50, 2),
                stage("decode.step", 52, 5),
            ],
            sent_ms=57,
        ).SerializeToString()
    )
    timeline.second_at = 100.070
    timeline.ended_at = 100.080
    return timeline


def test_parts_of_a_split_request_add_up() -> None:
    timings = split_request().timings()
    assert timings == pytest.approx(
        {
            "arrive": 0,
            "receive": 1,
            "tokenize": 3,
            "place": 4,
            "queue": 3 + 2 + 8,  # decode's, the announcement, prefill's
            "fetch": 0,
            "prefill": 20,  # and the 2 ms between its chunks
            "relay": 2 + 1 + (21 - 14) + 2,  # before placing; on the way to decode, to prefill, and back
            "ttft": 53,
            "transfer_tail": 6,
            "decode_wait": 2,
            "step": 5,
            "step_relay": 2 + 2,
            "second_token": 17,
            "total": 80,
        },
        abs=0.01,
    )
    first = ("receive", "tokenize", "place", "queue", "fetch", "prefill", "relay")
    assert sum(timings[part] for part in first) == pytest.approx(timings["ttft"], abs=0.01)
    second = ("transfer_tail", "step", "decode_wait", "step_relay")
    assert sum(timings[part] for part in second) == pytest.approx(timings["second_token"], abs=0.01)


def test_without_a_workers_word_its_time_is_prefill() -> None:
    timeline = Timeline(10.0)
    worker = timeline.at_worker("decode", "d0")
    worker.sent_at, worker.ended_at = 10.01, 10.05
    timeline.first_at = 10.06
    timings = timeline.timings()
    assert timings["prefill"] == pytest.approx(40)
    assert timings["relay"] == pytest.approx(20)
    assert "second_token" not in timings


def test_stages_lie_within_what_the_router_saw_however_clocks_differ() -> None:
    """The worker counts from when it received the request: its clock's zero is of no interest."""
    timeline = Timeline()
    worker = timeline.at_worker("decode", "d0")
    time.sleep(0.01)
    worker.tell(messages_pb2.Stages(stages=[stage("prefill.chunk", 0, 4)], sent_ms=4))
    (_, began_at, ended_at, _), *_ = worker.stages()
    assert worker.sent_at <= began_at < ended_at <= time.perf_counter()


def test_spans_name_their_parents_services_and_what_they_did() -> None:
    timeline = split_request()
    timeline.count(PROGRESS_TOKENS + 1)
    spans = timeline.explain()["spans"]
    assert [(span["name"], span["service"]) for span in spans] == [
        ("http.request", "router"),
        ("receive", "router"),
        ("tokenize", "router"),
        ("place", "router"),
        ("decode", "decode"),
        ("decode.queue", "decode"),
        ("decode.wait_kv", "decode"),
        ("decode.transfer_tail", "decode"),
        ("decode.queue", "decode"),
        ("decode.step", "decode"),
        ("prefill", "prefill"),
        ("kv.announce", "prefill"),
        ("prefill.queue", "prefill"),
        ("prefill.chunk[0]", "prefill"),
        ("prefill.chunk[1]", "prefill"),
    ]
    names = [span["name"] for span in spans]
    assert {names[span["parent"]] for span in spans if span["service"] == "prefill"} == {"http.request", "prefill"}
    (tokens,) = [event for span in spans for event in span["events"] if event["name"] == "tokens"]
    assert tokens["attributes"] == {"tokens": PROGRESS_TOKENS + 1}
    assert spans[0]["attributes"]["gen_ai.usage.output_tokens"] == PROGRESS_TOKENS + 1
    assert spans[0]["attributes"]["gen_ai.server.time_to_first_token"] == pytest.approx(0.053)
