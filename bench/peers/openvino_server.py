"""OpenVINO GenAI behind /v1/completions, so that it can be measured over HTTP like the others. Runs in its own venv.

It has no HTTP server of its own. This one is made to cost little: prompts are token ids, nothing is detokenized, and
the tokens of one step go to the event loop in one call.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import queue
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
import uvicorn

Tokens = list[int]
Message = dict[str, Any]


class EngineThread:
    """Owns the pipeline. A request's tokens go, step by step, into its asyncio queue; None ends them."""

    def __init__(self, options: argparse.Namespace) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = options.kv_cache_gib
        scheduler.max_num_seqs = options.max_num_seqs
        scheduler.max_num_batched_tokens = options.max_num_batched_tokens
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = False
        properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": options.threads}
        if options.inference_precision != "auto":
            properties["INFERENCE_PRECISION_HINT"] = options.inference_precision
        if options.kv_cache_precision != "auto":
            properties["KV_CACHE_PRECISION"] = options.kv_cache_precision
        self._pipeline = genai.ContinuousBatchingPipeline(options.model, scheduler, "CPU", properties)
        self._inbox: queue.SimpleQueue[tuple[Tokens, int, asyncio.Queue[Tokens | None]]] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, prompt: Tokens, max_tokens: int) -> asyncio.Queue[Tokens | None]:
        tokens: asyncio.Queue[Tokens | None] = asyncio.Queue()
        self._inbox.put((prompt, max_tokens, tokens))
        return tokens

    def _run(self) -> None:
        assert self._loop is not None
        number, running = 0, []
        while True:
            while not running or not self._inbox.empty():
                prompt, max_tokens, tokens = self._inbox.get()
                config = genai.GenerationConfig()
                config.max_new_tokens, config.ignore_eos, config.do_sample = max_tokens, True, False
                ids = ov.Tensor(np.array([prompt], dtype=np.int64))
                running.append((self._pipeline.add_request(number, ids, config), tokens))
                number += 1
            self._pipeline.step()
            news, still_running = [], []
            for handle, tokens in running:
                if handle.can_read():
                    news += [(tokens, list(output.generated_ids)) for output in handle.read().values()]
                if handle.get_status() == genai.GenerationStatus.RUNNING:
                    still_running.append((handle, tokens))
                else:
                    news.append((tokens, None))
            running = still_running
            self._loop.call_soon_threadsafe(_deliver, news)


def _deliver(news: list[tuple[asyncio.Queue[Tokens | None], Tokens | None]]) -> None:
    for tokens, new in news:
        tokens.put_nowait(new)


class App:
    """The part of /v1/completions that a benchmark uses: token ids in, a stream out."""

    def __init__(self, engine: EngineThread) -> None:
        self._engine = engine

    async def __call__(
        self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        if scope["type"] == "lifespan":
            while (await receive())["type"] != "lifespan.shutdown":
                self._engine.start(asyncio.get_running_loop())
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
        elif scope["path"] == "/v1/completions":
            body = b""
            while (part := await receive()) and part["type"] == "http.request":
                body += part["body"]
                if not part.get("more_body"):
                    break
            await self._complete(json.loads(body), send)
        else:
            models = {"object": "list", "data": [{"id": "openvino", "object": "model"}]}
            await send(_start("application/json"))
            await send({"type": "http.response.body", "body": json.dumps(models).encode()})

    async def _complete(self, body: dict[str, Any], send: Callable[[Message], Awaitable[None]]) -> None:
        tokens = self._engine.submit(body["prompt"], body["max_tokens"])
        await send(_start("text/event-stream"))
        count = 0
        while (new := await tokens.get()) is not None:
            count += len(new)
            await send(_event({"choices": [{"index": 0, "text": "", "finish_reason": None, "token_ids": new}]}))
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}
        await send(_event({"choices": [], "usage": usage}))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def _start(content_type: str) -> Message:
    headers = [(b"content-type", content_type.encode())]
    return {"type": "http.response.start", "status": 200, "headers": headers}


def _event(value: dict[str, Any]) -> Message:
    return {"type": "http.response.body", "body": b"data: " + json.dumps(value).encode() + b"\n\n", "more_body": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder with the OpenVINO IR")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kv-cache-gib", type=int, default=2)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-num-batched-tokens", type=int, default=512)
    parser.add_argument("--inference-precision", default="auto", help="f32, bf16, f16; auto: OpenVINO's choice")
    parser.add_argument("--kv-cache-precision", default="auto", help="f32, f16, u8; auto: OpenVINO's choice")
    options = parser.parse_args()
    app = App(EngineThread(options))
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
