"""When requests are kept from a worker, and how it gets them back."""

from __future__ import annotations

from services.router.breaker import CircuitBreaker


def make_breaker() -> CircuitBreaker:
    return CircuitBreaker(max_failures=3, max_refusals=4, window_seconds=10, open_seconds=2, max_open_seconds=10)


def tripped(at: float) -> CircuitBreaker:
    breaker = make_breaker()
    for _ in range(3):
        breaker.failed(at)
    return breaker


def test_opens_with_the_third_failure_in_the_window() -> None:
    breaker = make_breaker()
    for now in (0.0, 5.0):
        breaker.failed(now)
        assert breaker.allows(now)
    breaker.failed(9.0)
    assert not breaker.is_closed
    assert not breaker.allows(9.0) and not breaker.allows(10.9)


def test_failures_far_apart_do_not_open_it() -> None:
    breaker = make_breaker()
    for now in range(0, 100, 6):
        breaker.failed(float(now))
        assert breaker.is_closed


def test_opens_with_refusals_in_a_row_and_not_with_some_among_many() -> None:
    breaker = make_breaker()
    for request in range(100):
        breaker.sent(request)
        if request % 4:
            breaker.refused(request, 0.0)
        else:
            breaker.worked(request)
    assert breaker.is_closed
    breaker.refused(100, 0.0)
    assert not breaker.is_closed and not breaker.allows(1.9) and breaker.allows(2.0)


def test_refusals_of_what_was_sent_before_say_nothing_of_a_trial() -> None:
    breaker = tripped(0.0)
    breaker.sent("a")
    breaker.refused("before", 2.5)
    assert not breaker.allows(100.0)
    breaker.refused("a", 3.0)
    assert not breaker.allows(6.9) and breaker.allows(7.0)


def test_half_open_lets_one_through_and_closes_when_it_worked() -> None:
    breaker = tripped(0.0)
    assert breaker.allows(2.0)
    breaker.sent("a")
    assert not breaker.allows(3.0)
    breaker.worked("b")  # sent before it opened: says nothing of now
    assert not breaker.is_closed
    breaker.worked("a")
    assert breaker.is_closed and breaker.allows(3.0)
    breaker.failed(3.0)  # it counts anew
    assert breaker.is_closed


def test_each_trial_that_fails_doubles_the_wait_up_to_a_limit() -> None:
    breaker, now, waits = tripped(0.0), 2.0, []
    for trial in range(4):
        assert breaker.allows(now)
        breaker.sent(trial)
        breaker.failed(now)
        wait = next(tenths / 10 for tenths in range(1, 1000) if breaker.allows(now + tenths / 10))
        waits.append(wait)
        now += wait
    assert waits == [4.0, 8.0, 10.0, 10.0]
    breaker.sent("last")
    breaker.worked("last")
    for _ in range(3):
        breaker.failed(now)
    assert not breaker.allows(now + 1.9) and breaker.allows(now + 2.0)


def test_trial_that_was_called_off_is_followed_by_another() -> None:
    breaker = tripped(0.0)
    breaker.sent("a")
    breaker.left("a")
    assert not breaker.is_closed and breaker.allows(2.0)
    breaker.sent("b")
    breaker.left("a")  # again
    assert not breaker.allows(2.0)


def test_failures_of_what_was_sent_before_do_not_double_the_wait() -> None:
    breaker = tripped(0.0)
    breaker.failed(0.5)
    assert not breaker.allows(2.4) and breaker.allows(2.5)


def test_request_that_went_there_for_want_of_others_is_a_trial() -> None:
    breaker = tripped(0.0)
    breaker.sent("a")
    breaker.worked("a")
    assert breaker.is_closed
