"""x-relevo-explain and /debug/route."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
import pytest

from services.router.http import explain
from services.router.http.explain import AnswerIds

from .conftest import Edge

BODY = {"prompt": "a", "max_tokens": 2, "n": 2}


@pytest.mark.parametrize("stream", [False, True])
async def test_who_asks_gets_the_terms_in_a_header(edge: Edge, stream: bool) -> None:
    body = {**BODY, "stream": stream}
    reply = await edge.http.post("/v1/completions", json=body, headers={"x-relevo-explain": "1"})
    assert reply.status_code == 200
    shown = orjson.loads(reply.headers["x-relevo-explain"])
    assert [choice["request_id"] for choice in shown] == [request.request_id for request in edge.dispatcher.requests]
    reply = await edge.http.post("/v1/completions", json=body)
    assert "x-relevo-explain" not in reply.headers


async def test_header_holds_as_many_candidates_as_there_is_room_for(
    edge: Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bulky(self: object, max_candidates: int | None = None) -> Mapping[str, Any]:
        return {"candidates": ["x" * 300] * (100 if max_candidates is None else min(100, max_candidates))}

    monkeypatch.setattr("tests.router.http.fakes.FakeGeneration.explain", bulky)
    reply = await edge.http.post("/v1/completions", json=BODY, headers={"x-relevo-explain": "1"})
    value = reply.headers["x-relevo-explain"]
    assert len(value) <= explain.MAX_HEADER_BYTES
    assert len(orjson.loads(value)[0]["candidates"]) == 8


async def test_route_is_found_by_the_requests_id_and_by_its_answers(edge: Edge) -> None:
    reply = await edge.http.post("/v1/completions", json=BODY, headers={"x-request-id": "mine"})
    names = [request.request_id for request in edge.dispatcher.requests]
    for request_id in ("mine", reply.json()["id"]):
        found = await edge.http.get(f"/debug/route/{request_id}")
        assert found.status_code == 200
        assert [record["request_id"] for record in found.json()] == names
    missing = await edge.http.get("/debug/route/other")
    assert missing.status_code == 404
    assert "other" in missing.json()["error"]["message"]


def test_only_the_last_answers_are_remembered() -> None:
    answers = AnswerIds()
    for number in range(explain.MAX_ANSWERS + 1):
        answers.remember(f"request{number}", f"answer{number}")
    assert answers.of("request0") == "request0"
    assert answers.of("request1") == "answer1"
