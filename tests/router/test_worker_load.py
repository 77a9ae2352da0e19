from __future__ import annotations

from services.pb.messages_pb2 import Load
from services.router.worker_load import SETTLE_SECONDS, WorkerLoad


def test_requests_count_until_a_report_can_have_seen_them() -> None:
    load = WorkerLoad()
    load.reported(Load(num_running=2, num_waiting=1, num_waiting_tokens=100, step_seconds=0.2), now=0.0)
    load.sent(1, 40, now=1.0)
    load.sent(2, 60, now=1.1)
    assert (load.num_requests, load.num_waiting_tokens) == (5, 200)
    report = Load(num_running=3, num_waiting_tokens=40, step_seconds=0.2)
    load.reported(report, now=1.0 + 0.2 + SETTLE_SECONDS + 0.01)  # late enough for the first alone
    assert (load.num_requests, load.num_waiting_tokens) == (4, 100)
    load.reported(report, now=2.0)
    assert (load.num_requests, load.num_waiting_tokens) == (3, 40)


def test_ended_requests_count_no_more() -> None:
    load = WorkerLoad()
    load.sent(1, 40, now=1.0)
    load.ended(1)
    load.ended(1)
    assert (load.num_requests, load.num_waiting_tokens) == (0, 0)


def test_reset_forgets_both_parts_and_assumes_an_empty_worker() -> None:
    load = WorkerLoad()
    load.reported(Load(num_running=2), now=0.0)
    load.sent(1, 40, now=1.0)
    load.reset(num_blocks=100)
    assert (load.num_requests, load.num_waiting_tokens, load.report.num_free_blocks) == (0, 0, 100)
