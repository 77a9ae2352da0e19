"""/debug/fleet, its stream, and the files of the live page, at the HTTP edge alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import orjson
import pytest

from relevo.model_files import GenerationDefaults
from relevo.tokenizer import Tokenizer
from services.router.http import live as live_module
from services.router.http.live import LiveView
from services.router.http.live_routes import UI_FOLDER
from tests.router.http.conftest import NAME, Edge, make_served, running

KEY = {"authorization": "Bearer k"}


@asynccontextmanager
async def watched(
    tokenizer: Tokenizer, defaults: GenerationDefaults, api_key: str | None = None
) -> AsyncIterator[tuple[Edge, LiveView, asyncio.Event]]:
    """An edge whose live view is run, until the event is set."""
    live, stopping = LiveView(), asyncio.Event()
    served = make_served(tokenizer, defaults, api_key, live=live)
    async with asyncio.TaskGroup() as group:
        group.create_task(live.run(stopping))
        async with running(served) as edge:
            try:
                yield edge, live, stopping
            finally:
                stopping.set()


async def read_events(lines: AsyncIterator[str], count: int) -> list[tuple[str, object]]:
    events, name = [], ""
    async for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            events.append((name, orjson.loads(line.removeprefix("data: "))))
            if len(events) == count:
                break
    return events


async def test_a_snapshot_says_what_the_router_is_doing(edge: Edge) -> None:
    reply = await edge.http.get("/debug/fleet")
    assert reply.headers["content-type"] == "application/json"
    found = reply.json()
    assert found["router"]["models"] == [NAME, "alias"]
    assert found["router"]["num_running"] == 0
    assert found["router"]["max_model_len"] == 256
    assert found["workers"] == found["agents"] == found["requests"] == []


async def test_a_stream_has_the_history_then_a_snapshot_every_second_and_ends_with_the_router(
    tokenizer: Tokenizer, defaults: GenerationDefaults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_module, "INTERVAL_SECONDS", 0.05)
    async with (
        watched(tokenizer, defaults) as (edge, live, stopping),
        edge.http.stream("GET", "/debug/fleet/stream") as stream,
    ):
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = stream.aiter_lines()
        events = await read_events(lines, 4)
        assert [name for name, _ in events] == ["history", "fleet", "fleet", "fleet"]
        assert isinstance(events[0][1], list) and events[0][1][0]["running"] == 0
        assert live.num_viewers == 1
        stopping.set()
        assert [name for name, _ in await read_events(lines, 99)][-1] == "end"
        refused = await edge.http.get("/debug/fleet/stream")
        assert refused.status_code == 503
    assert live.num_viewers == 0


async def test_many_viewers_share_one_look_at_the_fleet(
    tokenizer: Tokenizer, defaults: GenerationDefaults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_module, "MAX_VIEWERS", 20)
    num_looks = 0
    async with watched(tokenizer, defaults) as (edge, live, _):
        look = edge.dispatcher.describe_fleet

        async def counted() -> dict[str, object]:
            nonlocal num_looks
            num_looks += 1
            return await look()

        monkeypatch.setattr(edge.dispatcher, "describe_fleet", counted)

        async def view() -> None:
            async with edge.http.stream("GET", "/debug/fleet/stream") as stream:
                assert len(await read_events(stream.aiter_lines(), 3)) == 3
                if live.num_viewers == 20:
                    assert (await edge.http.get("/debug/fleet/stream")).status_code == 429

        await asyncio.gather(*(view() for _ in range(20)))
        assert num_looks <= 3
        async with asyncio.timeout(5):
            while live.num_viewers:  # noqa: ASYNC110  # the server hears that they left a moment later
                await asyncio.sleep(0.01)


async def test_figures_are_behind_the_key_and_the_page_is_not(
    tokenizer: Tokenizer, defaults: GenerationDefaults
) -> None:
    async with watched(tokenizer, defaults, "k") as (edge, _, _):
        for path in ("/debug/fleet", "/debug/fleet/history", "/debug/fleet/stream", "/uix", "/ui%2f..%2fmetrics"):
            for headers in ({}, {"authorization": "Bearer other"}):
                assert (await edge.http.get(path, headers=headers)).status_code in (401, 404), path
        assert (await edge.http.get("/debug/fleet", headers=KEY)).status_code == 200
        assert (await edge.http.get("/debug/fleet/history", headers=KEY)).json()
        page = await edge.http.get("/ui")
        assert page.status_code == 200
        for name in [path.name for path in UI_FOLDER.iterdir()]:
            assert (await edge.http.get(f"/ui/{name}")).status_code == 200


async def test_files_have_types_tags_and_a_strict_policy(edge: Edge) -> None:
    page = await edge.http.get("/ui")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    again = await edge.http.get("/ui", headers={"if-none-match": f'"other", W/{page.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert (await edge.http.get("/ui", headers={"if-none-match": '"other"'})).status_code == 200
    slash = await edge.http.get("/ui/")
    assert (slash.status_code, slash.headers["location"]) == (308, "../ui")
    for missing in ("/ui/none.js", "/ui/../app.py", "/ui/%2e%2e%2fapp.py", "/ui/..%2f__main__.py"):
        async with httpx.AsyncClient(base_url=edge.http.base_url) as plain:
            assert (await plain.get(missing)).status_code == 404
    assert (await edge.http.post("/ui")).status_code == 405
