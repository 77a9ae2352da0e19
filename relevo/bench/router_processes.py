"""The processes of `relevo bench router`: routers, and workers without a model. Each is pinned to a core."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import IO, Any

import orjson

from relevo.bench.http_load import post
from relevo.bench.kv_processes import END_SECONDS, end_process
from relevo.core.errors import StartupError
from relevo.model_files import resolve_model
from relevo.tokenizer import Tokenizer

_PATH = "/v1/completions"


def prompts(input_len: int, count: int) -> list[str]:
    """Texts of that many tokens of the demo's tokenizer, all different."""
    tokenizer = Tokenizer.from_files(resolve_model(None, weights=False))
    assert tokenizer is not None
    numbers = random.Random(0)
    words = [tokenizer.decode([token_id]) for token_id in range(300, 3300)]
    plain = [word for word in words if word.isascii() and word.strip().isalpha() and word.startswith(" ")]
    texts: list[str] = []
    while len(texts) < count:
        text = "".join(numbers.choice(plain) for _ in range(input_len))
        ids = tokenizer.encode(text, add_special_tokens=False)[:input_len]
        texts.append(tokenizer.decode(ids))
    return texts


def completion_requests(texts: Sequence[str], port: int, *, stream: bool, max_tokens: int) -> list[bytes]:
    """One request a prompt, as bytes for the socket."""
    bodies = (
        orjson.dumps({"model": "bench", "prompt": text, "max_tokens": max_tokens, "stream": stream, "ignore_eos": True})
        for text in texts
    )
    return [post("127.0.0.1", port, _PATH, body) for body in bodies]


class BenchWorker:
    """A process that answers without a model; `module` says in which language. Ends with the stack."""

    def __init__(self, stack: ExitStack, module: str, core: int) -> None:
        process, line = _spawn(stack, [module], core, stdin=subprocess.PIPE)
        self.pid = process.pid
        self.address: str = line["address"]
        assert process.stdin is not None
        self._commands: IO[bytes] = process.stdin
        stack.callback(self._commands.close)

    def set_rate(self, tokens_per_second: float) -> None:
        """0: step after step, as fast as they are taken; inf: each answer in one step."""
        self._commands.write(f"rate {tokens_per_second}\n".encode())
        self._commands.flush()


def start_router(
    stack: ExitStack, workers: Sequence[str], core: int, flags: Sequence[str] = ("--http-port", "0")
) -> tuple[int, int]:
    """Its pid and its HTTP port. Raises StartupError."""
    common = ["--port", "0", "--decode", ",".join(workers), "--log-level", "error", "--served-model-name", "bench"]
    process, line = _spawn(stack, ["services.router", *common, *flags], core)
    return process.pid, int(str(line["http"]).rpartition(":")[2])


def _spawn(
    stack: ExitStack, module: Sequence[str], core: int, **options: Any
) -> tuple[subprocess.Popen[bytes], dict[str, Any]]:
    ready, fd = os.pipe()
    command = [sys.executable, "-m", *module, "--ready-fd", str(fd)]
    process = subprocess.Popen(command, pass_fds=(fd,), **options)
    stack.callback(end_process, process)
    os.sched_setaffinity(process.pid, {core})
    os.close(fd)
    with os.fdopen(ready, "rb") as lines:
        line = lines.readline()
    if not line:
        raise StartupError(f"{module[0]} did not start (exit code {process.wait(END_SECONDS)})")
    return process, json.loads(line)
