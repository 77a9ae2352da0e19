"""The queue's order by itself, and what it says to those who find it full. Random sequences, no clock."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from services.router.backlog import MAX_WAIT_SECONDS, Backlog
from services.router.fair_queue import Entry, FairQueue


def drain(queue: FairQueue[str], num: int | None = None) -> list[str]:
    served: list[str] = []
    while (num is None or len(served) < num) and (entry := queue.peek()) is not None:
        queue.serve(entry)
        served.append(entry.item)
    return served


def test_alone_it_is_first_come_first_served() -> None:
    queue: FairQueue[str] = FairQueue(10)
    for item in "abc":
        queue.push(item, "me")
    assert drain(queue) == ["a", "b", "c"]


def test_lower_priorities_go_first() -> None:
    queue: FairQueue[str] = FairQueue(10)
    for item, priority in (("late", 5), ("normal", 0), ("urgent", -3), ("normal too", 0)):
        queue.push(item, "me", priority=priority)
    assert drain(queue) == ["urgent", "normal", "normal too", "late"]


def test_who_sends_rarely_waits_for_no_backlog_but_its_own() -> None:
    queue: FairQueue[str] = FairQueue(100)
    for number in range(50):
        queue.push(f"hog {number}", "hog")
    drain(queue, 3)
    queue.push("rare", "rare")
    assert "rare" in drain(queue, 2)


def test_shares_follow_weights_and_costs() -> None:
    queue: FairQueue[str] = FairQueue(1000)
    for _ in range(300):
        queue.push("heavy", "heavy", weight=3.0)
        queue.push("light", "light")
        queue.push("long", "long", cost=2.0)
    served = drain(queue, 270)
    assert abs(served.count("heavy") - 180) <= 3
    assert abs(served.count("light") - 60) <= 2
    assert abs(served.count("long") - 30) <= 2


def test_a_full_queue_gives_the_last_place_to_whom_it_is_due() -> None:
    queue: FairQueue[str] = FairQueue(3)
    for number in range(3):
        queue.push(f"hog {number}", "hog")
    assert queue.push("hog 3", "hog") == (None, None)
    entry, displaced = queue.push("rare", "rare")
    assert entry is not None
    assert displaced is not None
    assert displaced.item == "hog 2"
    assert queue.push("unimportant", "other", priority=1) == (None, None)
    entry, displaced = queue.push("urgent", "hog", priority=-1)
    assert displaced is not None
    assert displaced.item == "hog 1"
    assert drain(queue) == ["urgent", "hog 0", "rare"]


def test_who_tries_is_not_displaced() -> None:
    queue: FairQueue[str] = FairQueue(1)
    first, _ = queue.push("first", "a")
    assert queue.push("urgent", "b", priority=-1, keep=first) == (None, None)
    assert [each.item for each in queue] == ["first"]


CLIENTS = {"a": 1.0, "b": 2.0, "c": 0.5}
PUSH = st.tuples(st.just("push"), st.sampled_from(sorted(CLIENTS)), st.integers(-1, 1), st.floats(1, 10))
TAKE = st.tuples(st.sampled_from(["serve", "remove"]), st.integers(0, 50))


@given(st.lists(st.one_of(PUSH, TAKE), max_size=120))
def test_order_and_bound_hold_whatever_happens(steps: list[tuple[object, ...]]) -> None:
    queue: FairQueue[int] = FairQueue(12)
    inside: list[Entry[int]] = []
    for number, step in enumerate(steps):
        match step:
            case ("push", str(client), int(priority), float(cost)):
                entry, displaced = queue.push(number, client, priority=priority, weight=CLIENTS[client], cost=cost)
                if displaced is not None:
                    assert entry is not None
                    assert len(inside) == 12
                    assert displaced is max(inside)
                    assert entry < displaced
                    inside.remove(displaced)
                if entry is None:
                    assert len(inside) == 12
                else:
                    inside.append(entry)
            case ("serve", _):
                entry = queue.peek()
                assert (entry is None) == (not inside)
                if entry is not None:
                    assert entry is min(inside)
                    assert entry.priority == min(each.priority for each in inside)
                    mine = [each for each in inside if (each.client, each.priority) == (entry.client, entry.priority)]
                    assert entry.number == min(each.number for each in mine), "a client's own order"
                    queue.serve(entry)
                    inside.remove(entry)
            case ("remove", int(nth)) if inside:
                entry = inside.pop(nth % len(inside))
                queue.remove(entry)
                queue.remove(entry)
        assert len(queue) == len(inside) <= 12
        assert set(queue) == set(inside)


@given(st.lists(st.tuples(st.sampled_from(sorted(CLIENTS)), st.floats(1, 10)), min_size=30, max_size=300))
def test_whoever_always_waits_gets_its_share(arrivals: list[tuple[str, float]]) -> None:
    """Goyal et al., theorem 1: |W1/w1 - W2/w2| <= c1/w1 + c2/w2 while both have something waiting."""
    queue: FairQueue[float] = FairQueue(1000)
    for client, cost in arrivals:
        queue.push(cost, client, weight=CLIENTS[client], cost=cost)
    waiting = {client: sum(name == client for name, _ in arrivals) for client in CLIENTS}
    work = dict.fromkeys(CLIENTS, 0.0)
    while all(waiting.values()):
        entry = queue.peek()
        assert entry is not None
        queue.serve(entry)
        waiting[entry.client] -= 1
        work[entry.client] += entry.item / CLIENTS[entry.client]
        for one in CLIENTS:
            for two in CLIENTS:
                assert work[one] - work[two] <= 10 / CLIENTS[one] + 10 / CLIENTS[two] + 1e-6


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_wait_follows_from_how_fast_the_queue_moves() -> None:
    clock = Clock()
    backlog = Backlog(clock)
    assert backlog.wait_seconds(5) == 1.0
    backlog.hint(4.0)
    backlog.hint(0.0)
    backlog.queued()
    assert backlog.wait_seconds(5) == 4.0
    for _ in range(10):
        clock.now += 0.5
        backlog.admitted()
    assert backlog.wait_seconds(20) == pytest.approx(10.0)
    clock.now += 5.0
    assert backlog.wait_seconds(20) == pytest.approx(20.0), "it stands still"
    clock.now += 1e6
    assert backlog.wait_seconds(20) == MAX_WAIT_SECONDS
    backlog.emptied()
    assert backlog.wait_seconds(1) == 4.0
