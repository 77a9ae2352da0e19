"""Why a request went where it went: in a response header for whoever asks, and at /debug/route for a while after."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import orjson
from starlette.types import Message, Send

from services.router.http.choice import Choice

EXPLAIN_HEADER = b"x-relevo-explain"
MAX_HEADER_BYTES = 7500  # clients take 8 KiB in a header, some no more
MAX_ANSWERS = 1000


class AnswerIds:
    """What the answers to the last MAX_ANSWERS requests were named. Placements are logged under the answer's name."""

    def __init__(self) -> None:
        self._by_request: OrderedDict[str, str] = OrderedDict()

    def remember(self, request_id: str, answer_id: str) -> None:
        self._by_request[request_id] = answer_id
        self._by_request.move_to_end(request_id)
        if len(self._by_request) > MAX_ANSWERS:
            self._by_request.popitem(last=False)

    def of(self, request_id: str) -> str:
        """The name of the request's answer; what is no request's id is taken to be one."""
        return self._by_request.get(request_id, request_id)


def explaining(send: Send, choices: Sequence[Choice]) -> Send:
    """`send` that puts the terms of all candidates into the response's head."""

    async def send_explained(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (EXPLAIN_HEADER, _header_value(choices))]
        await send(message)

    return send_explained


def _header_value(choices: Sequence[Choice]) -> bytes:
    """A JSON array, an object a choice that was placed, with the cheapest candidates that fit."""
    max_candidates: int | None = None
    while True:
        value = orjson.dumps([why for choice in choices if (why := choice.explain(max_candidates)) is not None])
        if len(value) <= MAX_HEADER_BYTES or max_candidates == 0:
            return value if len(value) <= MAX_HEADER_BYTES else b"[]"  # a thousand choices
        max_candidates = 32 if max_candidates is None else max_candidates // 2
