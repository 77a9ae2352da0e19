"""An OpenAI-compatible endpoint, as a person's tool asks it: errors are sentences."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from relevo.core.errors import Exhausted, InvalidRequest, NotFound, RelevoError, Unauthenticated, Unavailable

# A first token may be long in coming; whoever sits there has Ctrl-C.
_TIMEOUT = httpx.Timeout(600, connect=5, pool=5)
_MAX_ERROR_CHARS = 500


@dataclass(slots=True)
class Answer:
    """What has come so far; after an interrupt, what had come by then.

    ttft_seconds, seconds: since the request was sent
    num_tokens: as the server counts them, None before its end or where it doesn't
    """

    text: str = ""
    finish_reason: str | None = None
    num_tokens: int | None = None
    ttft_seconds: float | None = None
    seconds: float = 0.0


class Endpoint:
    """Context manager. url: with or without /v1. What it raises is a RelevoError that says what to do about it."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise InvalidRequest(f"--url {url}: http://HOST:PORT is right, such as http://127.0.0.1:8000")
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            self._client = httpx.Client(base_url=self.url, headers=headers, timeout=_TIMEOUT)
        except (httpx.InvalidURL, ValueError) as error:
            raise InvalidRequest(f"--url {url}: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._client.close()

    def get(self, path: str) -> httpx.Response:
        """Its answer is 200."""
        with self._readable_errors():
            response = self._client.get(path, timeout=10)
            _check(response)
            return response

    def get_json(self, path: str) -> Any:
        try:
            return self.get(path).json()
        except ValueError as error:
            raise Unavailable(
                f"{self.url}{path} does not answer in JSON: is it an OpenAI-compatible endpoint?"
            ) from error

    def models(self) -> list[str]:
        listed = self.get_json("/v1/models")
        try:
            names = [str(model["id"]) for model in listed["data"]]
        except (KeyError, TypeError) as error:
            raise Unavailable(f"{self.url}/v1/models lists no models: is it an OpenAI-compatible endpoint?") from error
        if not names:
            raise Unavailable(f"{self.url} serves no model")
        return names

    def chat(self, body: Mapping[str, Any], answer: Answer, write: Callable[[str], None]) -> None:
        """Ask, and hand the text on as it comes; `answer` grows with it. Left early, the request is cancelled."""
        sent = time.monotonic()
        streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
        try:
            with (
                self._readable_errors(),
                self._client.stream("POST", "/v1/chat/completions", json=streamed) as response,
            ):
                if response.status_code != 200:
                    response.read()
                    _check(response)
                for event in _events(response):
                    text = _take(event, answer)
                    if text:
                        answer.ttft_seconds = answer.ttft_seconds or time.monotonic() - sent
                        answer.text += text
                        write(text)
        finally:
            answer.seconds = time.monotonic() - sent

    @contextmanager
    def _readable_errors(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError as error:
            raise Unavailable(f"nobody answers at {self.url} ({error}): `relevo serve` starts an endpoint") from error
        except httpx.TimeoutException as error:
            raise Unavailable(f"{self.url} does not answer in time ({type(error).__name__})") from error
        except httpx.HTTPError as error:
            raise Unavailable(f"the connection to {self.url} broke: {error or type(error).__name__}") from error


def _events(response: httpx.Response) -> Iterator[Any]:
    """The stream's events, to [DONE]. Raises Unavailable if it ends without."""
    for line in response.iter_lines():
        if not line.startswith("data:"):
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            return
        try:
            event = json.loads(data)
        except ValueError as error:
            raise Unavailable(f"the answer is no stream of JSON: {data[:100]!r}") from error
        if isinstance(event, dict) and "error" in event:
            raise Unavailable(f"the answer broke off: {_message(event) or data[:_MAX_ERROR_CHARS]}")
        yield event
    raise Unavailable("the answer broke off: the stream ended without [DONE]")


def _take(event: Any, answer: Answer) -> str:
    """The text that an event brings; everything else goes into `answer`. What is not there is not missed."""
    if not isinstance(event, dict):
        return ""
    usage, choices = event.get("usage"), event.get("choices")
    if isinstance(usage, dict) and isinstance(usage.get("completion_tokens"), int):
        answer.num_tokens = usage["completion_tokens"]
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return ""
    answer.finish_reason = choices[0].get("finish_reason") or answer.finish_reason
    delta = choices[0].get("delta")
    text = delta.get("content") if isinstance(delta, dict) else None
    return text if isinstance(text, str) else ""


def _check(response: httpx.Response) -> None:
    """Raises what an answer other than 200 means."""
    status = response.status_code
    if status == 200:
        return
    try:
        message = _message(response.json())
    except ValueError:
        message = ""
    message = message or " ".join(response.text.split())[:_MAX_ERROR_CHARS] or response.reason_phrase
    if status == 401:
        raise Unauthenticated(f"{message} (give --api-key, or RELEVO_API_KEY)")
    if status == 404:
        raise NotFound(message)
    if status == 429:
        after = response.headers.get("retry-after")
        raise Exhausted(f"{message} (try again in {after} s)" if after else message)
    if 400 <= status < 500:
        raise InvalidRequest(message)
    raise RelevoError(f"{status}: {message}")


def _message(reply: Any) -> str:
    """OpenAI's error shape, or what comes close."""
    error = reply.get("error") if isinstance(reply, dict) else None
    found = error.get("message") if isinstance(error, dict) else error
    return str(found) if found else ""
