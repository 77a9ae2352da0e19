from __future__ import annotations

import asyncio

import pytest

from relevo.core.errors import Cancelled, DeadlineExceeded, Unavailable
from services.router.inbox import Inbox


async def test_reader_gets_all_that_is_pending_at_once() -> None:
    inbox: Inbox[int] = Inbox()
    for item in range(3):
        assert inbox.put(item)
    assert await inbox.take() == [0, 1, 2]
    reading = asyncio.create_task(inbox.take())
    await asyncio.sleep(0)
    inbox.put(3)
    inbox.put(4)
    assert await reading == [3, 4]


async def test_pending_items_come_before_the_first_error() -> None:
    inbox: Inbox[int] = Inbox()
    inbox.put(1)
    inbox.fail(DeadlineExceeded("late"))
    inbox.fail(Unavailable("gone"))
    assert not inbox.put(2)
    assert await inbox.take() == [1]
    for _ in range(2):
        with pytest.raises(DeadlineExceeded):
            await inbox.take()


async def test_error_wakes_the_reader() -> None:
    inbox: Inbox[int] = Inbox()
    reading = asyncio.create_task(inbox.take())
    await asyncio.sleep(0)
    inbox.fail(Unavailable("gone"))
    with pytest.raises(Unavailable):
        await reading


async def test_cancelled_reader_loses_nothing() -> None:
    inbox: Inbox[int] = Inbox()
    reading = asyncio.create_task(inbox.take())
    await asyncio.sleep(0)
    inbox.put(1)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert await inbox.take() == [1]


async def test_full_inbox_ends_its_own_request() -> None:
    inbox: Inbox[int] = Inbox(2)
    assert inbox.put(1)
    assert inbox.put(2)
    assert not inbox.put(3)
    assert await inbox.take() == [1, 2]
    with pytest.raises(Cancelled, match="too slowly"):
        await inbox.take()
