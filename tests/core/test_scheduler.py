from __future__ import annotations

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from relevo.core.prompt_budget import PromptLimit
from relevo.core.prompt_costs import PromptCosts
from relevo.core.request import FinishReason, Request, RequestStatus
from relevo.core.schedule import SchedulerOutput
from relevo.core.scheduler import Scheduler
from tests.support.builders import make_request, make_scheduler


def step(scheduler: Scheduler) -> tuple[SchedulerOutput, list[Request]]:
    """One step in which every request that samples gets a token that its position determines."""
    output = scheduler.schedule()
    sampled = {e.request.request_id: [next_token(e.request)] for e in output.scheduled if e.samples}
    ended = scheduler.update(output, sampled)
    scheduler.check()
    return output, ended


def next_token(request: Request) -> int:
    return 1000 + request.num_tokens


def with_drafts(output: SchedulerOutput, num_right: int) -> SchedulerOutput:
    """Drafts in all slots, of which the first are what will be sampled."""
    entries = [
        entry.with_drafts(
            [1000 + entry.request.num_tokens + i if i < num_right else 9000 + i for i in range(entry.num_draft_slots)]
        )
        if entry.num_draft_slots
        else entry
        for entry in output.scheduled
    ]
    return replace(output, scheduled=entries)


def accepted(output: SchedulerOutput) -> dict[str, list[int]]:
    """The drafts that equal what would be sampled anyway, and one token more; up to the request's end."""
    sampled = {}
    for entry in output.scheduled:
        if entry.samples:
            num_tokens, drafts = entry.request.num_tokens, entry.draft_token_ids
            right = [draft == 1000 + num_tokens + i for i, draft in enumerate(drafts)]
            count = 1 + (right.index(False) if False in right else len(right))
            sampled[entry.request.request_id] = entry.request.until_end([1000 + num_tokens + i for i in range(count)])
    return sampled


def scheduled(output: SchedulerOutput) -> dict[str, int]:
    return {entry.request.request_id: entry.num_scheduled_tokens for entry in output.scheduled}


def test_long_prompt_is_computed_in_chunks_and_others_get_their_token_each_step() -> None:
    scheduler = make_scheduler(num_blocks=32, max_num_batched_tokens=8)
    scheduler.add(make_request("short", range(3), max_tokens=8))
    step(scheduler)
    scheduler.add(make_request("long", range(100, 120), max_tokens=2))
    chunks = [scheduled(step(scheduler)[0]) for _ in range(3)]
    assert chunks == [{"short": 1, "long": 7}, {"short": 1, "long": 7}, {"short": 1, "long": 6}]


def test_drafts_get_rows_behind_the_known_tokens_and_accepted_ones_advance_the_request() -> None:
    scheduler = make_scheduler(num_blocks=32)
    request = make_request("r", range(6), max_tokens=9)
    scheduler.add(request)
    step(scheduler)
    output = with_drafts(scheduler.schedule({"r": 3}), num_right=2)
    assert [(e.token_ids, e.num_scheduled_tokens) for e in output.scheduled] == [([1006, 1007, 1008, 9002], 4)]
    scheduler.update(output, accepted(output))
    scheduler.check()
    assert request.output_token_ids == [1006, 1007, 1008, 1009]
    assert request.num_computed_tokens == 9  # the draft that was rejected is not


def test_blocks_are_never_named_for_rejected_drafts() -> None:
    scheduler = make_scheduler(num_blocks=32)
    request = make_request("r", range(5), max_tokens=20)
    scheduler.add(request)
    step(scheduler)
    output = with_drafts(scheduler.schedule({"r": 7}), num_right=0)
    assert output.num_scheduled_tokens == 8  # two blocks are computed to their end
    scheduler.update(output, accepted(output))
    assert request.num_named_blocks == 1 and len(scheduler.pool._block_of) == 1


def test_an_end_among_the_accepted_drafts_is_the_last_token() -> None:
    scheduler = make_scheduler(num_blocks=32)
    stops = make_request("stops", range(5), max_tokens=20, stop_token_ids=[1007])
    full = make_request("full", range(50, 55), max_tokens=4)
    scheduler.add(stops)
    scheduler.add(full)
    step(scheduler)
    output = with_drafts(scheduler.schedule({"stops": 5, "full": 5}), num_right=5)
    ended = scheduler.update(output, accepted(output))
    scheduler.check()
    assert {request.request_id: request.finish_reason for request in ended} == {
        "stops": FinishReason.STOP,
        "full": FinishReason.LENGTH,
    }
    assert stops.output_token_ids == [1005, 1006, 1007] and full.output_token_ids == [1005, 1006, 1007, 1008]


def test_nobody_is_preempted_for_drafts() -> None:
    scheduler = make_scheduler(num_blocks=5, max_num_batched_tokens=32)
    for name, base in (("a", 0), ("b", 50)):
        scheduler.add(make_request(name, range(base, base + 7), max_tokens=3))
    step(scheduler)
    output = scheduler.schedule({"a": 2, "b": 2})
    assert not output.preempted and len(output.scheduled) == 2


def test_ends_with_length_and_with_a_stop_token() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("length", [1, 2], max_tokens=2))
    scheduler.add(make_request("stop", [1, 2, 3], max_tokens=9, stop_token_ids=[1004]))
    _, first = step(scheduler)
    _, second = step(scheduler)
    assert first == []
    assert {(r.request_id, r.finish_reason) for r in second} == {
        ("length", FinishReason.LENGTH),
        ("stop", FinishReason.STOP),
    }
    assert scheduler.pool.num_free_blocks == scheduler.pool.num_blocks


def test_second_request_finds_the_prefix_but_computes_its_last_block() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("first", range(8), max_tokens=1))
    step(scheduler)
    again = make_request("again", range(8), max_tokens=1)
    scheduler.add(again)
    output, _ = step(scheduler)
    assert scheduled(output) == {"again": 4}
    assert again.num_cached_tokens == 4


def test_cache_salt_keeps_prefixes_apart() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("first", range(8), max_tokens=1, cache_salt="a"))
    step(scheduler)
    scheduler.add(make_request("other", range(8), max_tokens=1, cache_salt="b"))
    assert scheduled(step(scheduler)[0]) == {"other": 8}


def test_youngest_is_preempted_when_blocks_run_out_and_ends_with_the_same_tokens() -> None:
    scheduler = make_scheduler(num_blocks=4, max_num_batched_tokens=32)
    requests = [make_request(name, range(base, base + 7), max_tokens=6) for name, base in (("old", 0), ("young", 50))]
    for request in requests:
        scheduler.add(request)
    preempted: list[str] = []
    for _ in range(30):
        output, _ = step(scheduler)
        preempted += [request.request_id for request in output.preempted]
    assert preempted and set(preempted) == {"young"}
    for request in requests:
        assert request.finish_reason is FinishReason.LENGTH
        assert request.output_token_ids == [1000 + 7 + i for i in range(6)]


def test_awaiting_request_reserves_then_runs_with_the_first_token_from_elsewhere() -> None:
    scheduler = make_scheduler()
    request = make_request("split", range(10), max_tokens=3, await_kv=True)
    scheduler.add(request)
    output, _ = step(scheduler)
    assert output.reserved == [request] and not output.scheduled
    assert len(request.block_ids) == 4  # 10 tokens and 3 of output
    scheduler.resume("split", 8, [777])
    scheduler.check()
    output, _ = step(scheduler)
    assert scheduled(output) == {"split": 3}  # the tail of two and the first token
    assert request.output_token_ids == [777, 1011]


def test_awaiting_request_whose_whole_prompt_arrived_without_a_token_recomputes_its_last_block() -> None:
    scheduler = make_scheduler()
    request = make_request("alone", range(8), max_tokens=1, await_kv=True)
    scheduler.add(request)
    step(scheduler)
    scheduler.resume("alone", 8, [])
    scheduler.check()
    output, ended = step(scheduler)
    assert scheduled(output) == {"alone": 4} and output.admitted == []
    assert ended == [request]


def test_awaiting_requests_are_never_preempted() -> None:
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add(make_request("waits", range(5), max_tokens=1, await_kv=True))
    scheduler.add(make_request("grows", range(50, 57), max_tokens=8))
    for _ in range(4):
        step(scheduler)
    assert scheduler.waiting_for_kv.keys() == {"waits"}
    scheduler.abort("waits")
    for _ in range(12):
        step(scheduler)
    assert scheduler.pool.num_free_blocks == 4


def test_held_blocks_stay_until_released() -> None:
    scheduler = make_scheduler(num_blocks=4)
    request = make_request("held", range(8), max_tokens=1, hold_blocks=True)
    scheduler.add(request)
    _, ended = step(scheduler)
    assert ended == [request]
    assert scheduler.pool.num_free_blocks == 2
    scheduler.release("held")
    scheduler.release("held")
    scheduler.check()
    assert scheduler.pool.num_free_blocks == 4


def test_the_most_urgent_goes_first_and_equals_as_they_came() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    for name, priority in (("a", 1), ("b", 0), ("c", 0), ("d", -1)):
        scheduler.add(make_request(name, [1, 2], max_tokens=1, priority=priority))
    order = [scheduled(step(scheduler)[0]) for _ in range(4)]
    assert order == [{"d": 2}, {"b": 2}, {"c": 2}, {"a": 2}]


def test_a_more_urgent_one_takes_the_place_of_the_least_urgent_which_ends_with_the_same_tokens() -> None:
    scheduler = make_scheduler(num_blocks=9, max_num_seqs=2)
    requests = {
        name: make_request(name, range(start, start + 7), max_tokens=6, priority=priority)
        for name, start, priority in (("low", 0, 2), ("mid", 20, 1))
    }
    for request in requests.values():
        scheduler.add(request)
    step(scheduler)
    requests["high"] = make_request("high", range(50, 57), max_tokens=6, priority=0)
    scheduler.add(requests["high"])
    output, _ = step(scheduler)
    assert [request.request_id for request in output.preempted] == ["low"]
    assert scheduled(output) == {"mid": 1, "high": 7}
    for _ in range(20):
        step(scheduler)
    for request in requests.values():
        assert request.output_token_ids == [1000 + 7 + i for i in range(6)]
    assert scheduler.pool.num_free_blocks == scheduler.pool.num_blocks


def test_nobody_is_preempted_for_an_equal_or_in_vain() -> None:
    scheduler = make_scheduler(num_blocks=8, max_num_seqs=4)
    scheduler.add(make_request("urgent", range(20), max_tokens=4, priority=-1))  # 5 blocks, 6 in the end
    scheduler.add(make_request("low", range(50, 54), max_tokens=2, priority=3))
    step(scheduler)
    scheduler.add(make_request("equal", range(90, 98), max_tokens=1, priority=3))
    scheduler.add(make_request("too long", range(70, 90), max_tokens=1, priority=2))
    assert step(scheduler)[0].preempted == []


def test_while_others_decode_prompts_take_the_time_that_there_is_for_them() -> None:
    scheduler = make_scheduler(num_blocks=100, max_num_seqs=8, max_num_batched_tokens=64)
    scheduler.add(make_request("alone", range(200, 240), max_tokens=1))
    scheduler.prompt_limit = PromptLimit(PromptCosts(token=0.1), seconds=1.01)
    assert scheduled(step(scheduler)[0]) == {"alone": 40}  # nobody decodes
    for i in range(4):
        scheduler.add(make_request(f"chat{i}", [i], max_tokens=40))
    step(scheduler)
    scheduler.add(make_request("long", range(100), max_tokens=1))
    chats = {f"chat{i}": 1 for i in range(4)}
    assert scheduled(step(scheduler)[0]) == {**chats, "long": 10}
    scheduler.add(make_request("short", range(300, 303), max_tokens=3))
    assert scheduled(step(scheduler)[0]) == {**chats, "long": 5, "short": 3}  # a long prompt keeps no other out
    assert scheduled(step(scheduler)[0]) == {**chats, "short": 1, "long": 10}
    for i in range(10):  # many wait for their first token, few decode: they go on sooner
        scheduler.add(make_request(f"more{i}", range(400 + 50 * i, 440 + 50 * i), max_tokens=1))
    output, _ = step(scheduler)
    assert 11 / 5 * 10 - 1 <= output.num_scheduled_tokens - 5 <= 11 / 5 * 10 + 1


def test_chunks_shrink_as_there_is_more_before_them() -> None:
    """A token takes 0.1 s and 0.01 s for each before it: at 50, the 1.2 s that there are do for one of 0.605 s."""
    scheduler = make_scheduler(num_blocks=100, max_num_seqs=8, max_num_batched_tokens=64)
    scheduler.add(make_request("chat", [0], max_tokens=90))
    step(scheduler)
    scheduler.prompt_limit = PromptLimit(PromptCosts(token=0.1, pair=0.01), seconds=1.2)
    scheduler.add(make_request("long", range(60), max_tokens=1))
    chunks, position = {}, 0
    while position < 60:
        chunks[position] = scheduled(step(scheduler)[0])["long"]
        position += chunks[position]
    assert chunks[0] == 8 and list(chunks.values()) == sorted(chunks.values(), reverse=True)
    assert all(count == 1 for position, count in chunks.items() if position >= 55)


def test_where_no_token_fits_a_prompt_saves_up_for_its_smallest_chunk_and_keeps_no_other_out() -> None:
    """There is 1 s a step. Behind 40 keys, 4 tokens take 4 * 0.5 s and 44 * 0.1 s for the keys: 6.4 s."""
    scheduler = make_scheduler(num_blocks=100, max_num_seqs=8, max_num_batched_tokens=41)
    scheduler.add(make_request("chat", [0], max_tokens=90))
    step(scheduler)
    scheduler.add(make_request("long", range(60), max_tokens=1))
    assert scheduled(step(scheduler)[0]) == {"chat": 1, "long": 40}
    scheduler.prompt_limit = PromptLimit(PromptCosts(token=0.5, key=0.1), seconds=1.0)
    for _ in range(6):
        assert scheduled(step(scheduler)[0]) == {"chat": 1}
    assert scheduled(step(scheduler)[0]) == {"chat": 1, "long": 4}
    scheduler.add(make_request("short", range(100, 102), max_tokens=1))
    chunks = [scheduled(step(scheduler)[0]) for _ in range(40)]
    assert sum(rows.get("short", 0) for rows in chunks[:5]) == 2
    assert sum(rows.get("long", 0) for rows in chunks) == 16
    assert all(rows["chat"] == 1 for rows in chunks)


class SchedulerMachine(RuleBasedStateMachine):
    """Random requests, resumptions, cancellations and steps on a pool that is too small for all of them at once."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = make_scheduler(num_blocks=7, block_size=4, max_num_seqs=3, max_num_batched_tokens=6)
        self.open: dict[str, Request] = {}
        self.held: set[str] = set()
        self.count = 0

    @rule(
        prefix=st.integers(0, 2),
        length=st.integers(1, 18),
        max_tokens=st.integers(1, 8),
        kind=st.sampled_from(["plain", "await", "hold", "await_hold"]),
        priority=st.integers(-1, 1),
    )
    def add(self, prefix: int, length: int, max_tokens: int, kind: str, priority: int) -> None:
        self.count += 1
        hold = "hold" in kind
        request = make_request(
            f"r{self.count}",
            range(prefix * 100, prefix * 100 + length),
            max_tokens=1 if hold else max_tokens,
            await_kv="await" in kind,
            hold_blocks=hold,
            priority=priority,
        )
        self.scheduler.add(request)
        self.open[request.request_id] = request

    @rule(seconds=st.none() | st.floats(0.1, 8.0), pair=st.floats(0.0, 0.2), key=st.floats(0.0, 0.5))
    def measure(self, seconds: float | None, pair: float, key: float) -> None:
        costs = PromptCosts(1.0, pair, key)
        self.scheduler.prompt_limit = None if seconds is None else PromptLimit(costs, seconds)

    @rule(num_drafts=st.integers(0, 6), num_right=st.integers(0, 6))
    def step(self, num_drafts: int = 0, num_right: int = 0) -> None:
        output = self.scheduler.schedule(dict.fromkeys(self.open, num_drafts))
        assert list(self.scheduler.waiting) == sorted(self.scheduler.waiting, key=lambda r: (r.priority, r.arrival))
        assert output.num_scheduled_tokens <= self.scheduler.config.max_num_batched_tokens
        assert len({id(entry.request) for entry in output.scheduled}) == len(output.scheduled)
        for entry in output.scheduled:
            assert entry.num_scheduled_tokens > 0 and entry.request.status is RequestStatus.RUNNING
            assert entry.num_draft_slots <= num_drafts and (entry.samples or not entry.num_draft_slots)
        output = with_drafts(output, num_right)
        assert output.num_scheduled_tokens <= self.scheduler.config.max_num_batched_tokens
        self.scheduler.check()
        for request in self.scheduler.update(output, accepted(output)):
            assert self.open.pop(request.request_id) is request
            assert request.output_token_ids == [
                1000 + request.num_prompt_tokens + i for i in range(request.num_output_tokens)
            ]
            assert request.num_output_tokens <= request.max_tokens
            if request.hold_blocks:
                self.held.add(request.request_id)

    @precondition(lambda self: self.scheduler.waiting_for_kv)
    @rule(data=st.data(), alone=st.booleans())
    def resume(self, data: st.DataObject, alone: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.scheduler.waiting_for_kv)))
        request = self.scheduler.waiting_for_kv[name]
        full = request.num_prompt_tokens // 4
        arrived = data.draw(st.integers(request.num_computed_tokens // 4, full))
        first = [] if alone or request.max_tokens == 1 else [next_token(request)]
        self.scheduler.resume(name, arrived * 4, first)

    @precondition(lambda self: self.open or self.held)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.open.keys() | self.held)))
        request = self.scheduler.abort(name)
        assert (request is None) == (name in self.held)
        self.open.pop(name, None)
        self.held.discard(name)
        assert self.scheduler.abort(name) is None

    @precondition(lambda self: self.held)
    @rule()
    def release(self) -> None:
        self.scheduler.release(self.held.pop())

    @invariant()
    def adds_up(self) -> None:
        self.scheduler.check()

    def teardown(self) -> None:
        """Whatever happened: everything ends, and every block comes back."""
        for _ in range(400):
            for name in list(self.scheduler.waiting_for_kv):
                self.scheduler.resume(name, self.scheduler.waiting_for_kv[name].num_computed_tokens, [])
            for name in list(self.held):
                self.scheduler.release(name)
            self.held.clear()
            self.step()
            if not self.open:
                break
        assert not self.open, f"never ended: {list(self.open)}"
        for name in self.held:
            self.scheduler.release(name)
        self.scheduler.check()
        assert self.scheduler.pool.num_free_blocks == self.scheduler.pool.num_blocks


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


def test_same_prompts_hold_its_full_blocks_once() -> None:
    """Those behind the first wait until its blocks are named, and compute no more than the partial last one."""
    scheduler = make_scheduler(num_blocks=32, max_num_seqs=8, max_num_batched_tokens=8)
    prompt = list(range(1, 19))  # four blocks and a half
    for index in range(4):
        scheduler.add(make_request(f"r{index}", prompt, max_tokens=3))
    scheduler.add(make_request("other", [50, 51, 52], max_tokens=3))  # waits for nobody
    computed = 0
    for step in range(20):
        output = scheduler.schedule()
        names = [entry.request.request_id for entry in output.scheduled]
        if step < 2:
            assert not {"r1", "r2", "r3"} & set(names)
        computed += output.num_scheduled_tokens
        scheduler.update(output, {e.request.request_id: [7] for e in output.scheduled if e.samples})
        scheduler.check()
        if len(scheduler.running) == 4:
            held = {block_id for request in scheduler.running for block_id in request.block_ids}
            assert len(held) <= 4 + 4 + 1
    assert not scheduler.running and not scheduler.waiting
    assert computed == 18 + 3 * 2 + 3 + 5 * 2  # the prompt, its end for three, the other, outputs


def test_who_waits_for_anothers_blocks_goes_on_when_that_one_is_gone() -> None:
    scheduler = make_scheduler(num_blocks=32, max_num_seqs=8, max_num_batched_tokens=8)
    prompt = list(range(1, 19))
    scheduler.add(make_request("first", prompt, await_kv=True))
    scheduler.add(make_request("second", prompt, await_kv=True))
    scheduler.add(make_request("third", prompt))
    assert [request.request_id for request in scheduler.schedule().reserved] == ["first"]
    assert not scheduler.schedule().scheduled
    scheduler.abort("first")
    assert [request.request_id for request in scheduler.schedule().reserved] == ["second"]
    assert not scheduler.schedule().scheduled
    scheduler.resume("second", 16, [])
    output = scheduler.schedule()
    assert sorted(e.request.request_id for e in output.scheduled) == ["second", "third"]
    assert [request.num_cached_tokens for request in output.admitted] == [16]
    assert output.num_scheduled_tokens == 4
    scheduler.check()
