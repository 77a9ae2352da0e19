"""One request to an OpenAI-compatible endpoint, timed as a client sees it."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson

from relevo.bench.workload import Ask
from relevo.core.errors import NotFound, Unavailable


@dataclass(slots=True)
class Answer:
    """What came of a request, and when, on time.perf_counter()'s clock.

    chunks: (when, tokens that it brought), of those that brought any
    num_tokens: as the server counts them; where it doesn't, as many as chunks
    error: why it failed, None if it didn't; then the figures mean nothing
    """

    sent: float
    output_len: int
    ended: float = 0.0
    chunks: list[tuple[float, int]] = field(default_factory=list)
    num_tokens: int = 0
    num_prompt_tokens: int | None = None
    error: str | None = None

    @property
    def ttft_ms(self) -> float:
        return 1e3 * (self.chunks[0][0] - self.sent)

    @property
    def tpot_ms(self) -> float | None:
        """(last token - first token) / (tokens after the first); None if there are none."""
        num_later = self.num_tokens - self.chunks[0][1]
        return 1e3 * (self.chunks[-1][0] - self.chunks[0][0]) / num_later if num_later > 0 else None

    @property
    def itl_ms(self) -> list[float]:
        """One for each token after the first chunk's; tokens that come together share the gap before them."""
        gaps = []
        for (before, _), (now, num_tokens) in itertools.pairwise(self.chunks):
            gaps += [1e3 * (now - before) / num_tokens] * num_tokens
        return gaps

    @property
    def e2e_ms(self) -> float:
        return 1e3 * (self.ended - self.sent)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """client: its base_url is the endpoint's, without /v1. ignore_eos is no OpenAI parameter, but most servers' own."""

    client: httpx.AsyncClient
    model: str
    ignore_eos: bool = True

    async def ask(self, ask: Ask) -> Answer:
        """Never raises for what an endpoint may do wrong: `Answer.error` says it."""
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": ask.prompt,
            "max_tokens": ask.output_len,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            body["ignore_eos"] = True
        answer = Answer(time.perf_counter(), ask.output_len)
        try:
            await self._stream(body, answer)
        except httpx.TimeoutException as error:
            answer.error = f"nothing came in time ({type(error).__name__})"
        except (httpx.HTTPError, orjson.JSONDecodeError) as error:
            answer.error = _one_line(f"{type(error).__name__}: {error}")
        except Unavailable as error:
            answer.error = error.message
        answer.ended = time.perf_counter()
        return answer

    async def _stream(self, body: dict[str, Any], answer: Answer) -> None:
        reader = _ChunkReader(answer)
        async with self.client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                raise Unavailable(f"POST /v1/completions answered {response.status_code}: {_one_line(text)}")
            async for line in response.aiter_lines():
                if line.startswith("data:") and line[5:].strip() != "[DONE]":
                    reader.take(time.perf_counter(), orjson.loads(line[5:]))
        reader.finish()


class _ChunkReader:
    """Sorts out what servers stream: usage at the end, with every chunk or never; a last chunk with no token."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._counted: int | None = None  # completion tokens, as the server last said
        self._last_may_be_empty = False

    def take(self, now: float, event: dict[str, Any]) -> None:
        if "error" in event:
            raise Unavailable(f"the stream broke: {_one_line(json.dumps(event['error']))}")
        choices, usage = event.get("choices"), event.get("usage")
        num_tokens = 1  # unless the server tells
        if usage:
            self._answer.num_prompt_tokens = usage.get("prompt_tokens")
            before, self._counted = self._counted or 0, int(usage.get("completion_tokens") or 0)
            num_tokens = self._counted - before
        if not choices:
            return
        if token_ids := choices[0].get("token_ids"):
            num_tokens = len(token_ids)
        self._last_may_be_empty = not (choices[0].get("text") or token_ids) and bool(choices[0].get("finish_reason"))
        if num_tokens > 0:
            self._answer.chunks.append((now, num_tokens))

    def finish(self) -> None:
        answer, counted = self._answer, self._counted
        taken = sum(tokens for _, tokens in answer.chunks)
        if self._last_may_be_empty and len(answer.chunks) > 1 and (counted is None or taken > counted):
            taken -= answer.chunks.pop()[1]  # it only told why the answer ended
        if not answer.chunks:
            raise Unavailable("the answer ended without a token")
        answer.num_tokens = taken if counted is None else counted


async def connect(client: httpx.AsyncClient, model: str | None, *, ignore_eos: bool = True) -> Endpoint:
    """The endpoint that `client` is for. Without a model: the first that it lists.

    Raises Unavailable if nobody listens, NotFound if no model was named and the endpoint doesn't list any.
    """
    if model is not None:
        return Endpoint(client, model, ignore_eos)
    try:
        response = await client.get("/v1/models")
    except httpx.HTTPError as error:
        raise Unavailable(_one_line(f"cannot reach {client.base_url}: {error or type(error).__name__}")) from error
    if response.status_code != 200:
        raise NotFound(f"GET /v1/models answered {response.status_code}; name the model with --model")
    try:
        name = str(response.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as error:
        raise NotFound("GET /v1/models lists no model; name it with --model") from error
    return Endpoint(client, name, ignore_eos)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]
