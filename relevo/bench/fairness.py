"""relevo bench fairness: what one long prompt costs the chats beside it on one engine."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from relevo.bench.commands import needs_engine, numbers, spinner, write_json
from relevo.bench.engine_commands import Json, Model
from relevo.bench.statistics import percentile
from relevo.bench.workload import random_prompts
from relevo.core.sampling_params import SamplingParams

if TYPE_CHECKING:
    from relevo.engine.engine import Engine

CHAT_PROMPT_TOKENS = 32
CHAT_OUTPUT_TOKENS = 256
STEPS_ALONE = 300
LONG = "long"


@dataclass(frozen=True)
class FairnessResult:
    """Between a chat's tokens, in ms: alone, and while the long prompt was read. ttft_seconds: the long prompt's."""

    step_stretch: float
    itl_p50_alone_ms: float
    itl_p99_alone_ms: float
    itl_p50_ms: float
    itl_p99_ms: float
    ttft_seconds: float

    @property
    def stretch_p99(self) -> float:
        return self.itl_p99_ms / self.itl_p99_alone_ms


def measure_fairness(
    engine: Engine, *, step_stretch: float, num_chats: int, input_len: int, num_cached: int, seed: int
) -> FairnessResult:
    """Chats that come and go; alone for a while, then beside one long prompt until its first token.

    num_cached: so many tokens of the long prompt are computed before
    """
    [long] = random_prompts(1, input_len=input_len, vocab_size=engine.info.vocab_size, seed=seed + 1)
    if num_cached:
        engine.submit(engine.make_request("before", long[:num_cached], _sampling(1)))
        while engine.has_unfinished_requests:
            engine.step()
    chats = _Chats(engine, num_chats, seed)
    while len(chats.itl_ms) < STEPS_ALONE:
        chats.step()
    alone = chats.itl_ms[STEPS_ALONE // 10 :]
    chats.itl_ms = []
    engine.submit(engine.make_request(LONG, long, _sampling(1)))
    started = time.perf_counter()
    while not chats.step():
        pass
    ttft_seconds = time.perf_counter() - started
    chats.end()
    return FairnessResult(
        step_stretch,
        itl_p50_alone_ms=percentile(alone, 50),
        itl_p99_alone_ms=percentile(alone, 99),
        itl_p50_ms=percentile(chats.itl_ms, 50),
        itl_p99_ms=percentile(chats.itl_ms, 99),
        ttft_seconds=ttft_seconds,
    )


class _Chats:
    """A set number of them; where one ends another begins, so that their contexts stay short.

    itl_ms: a step's duration is the time between tokens of all that have begun, since each gets one in every step.
    Steps that read a new one's prompt are left out: they would take longer without the long one, too.
    """

    def __init__(self, engine: Engine, num_chats: int, seed: int) -> None:
        self.itl_ms: list[float] = []
        self._engine = engine
        self._seed = seed
        self._num_begun = 0
        self._open: set[str] = set()
        for i in range(num_chats):
            self._begin(CHAT_OUTPUT_TOKENS * (i + 1) // num_chats)

    def step(self) -> bool:
        """Whether the long prompt's first token has come."""
        started = time.perf_counter()
        result = self._engine.step()
        seconds = time.perf_counter() - started
        if all(chunk.request_id == LONG for chunk in result.chunks):
            self.itl_ms.append(1000.0 * seconds)
        for ended in result.ended:
            if ended.request_id in self._open:
                self._open.remove(ended.request_id)
                self._begin(CHAT_OUTPUT_TOKENS)
        return any(tokens.request_id == LONG for tokens in result.tokens)

    def end(self) -> None:
        for name in self._open:
            self._engine.abort(name)
        while self._engine.has_unfinished_requests:
            self._engine.step()

    def _begin(self, max_tokens: int) -> None:
        name = f"chat{self._num_begun}"
        self._num_begun += 1
        vocab_size, seed = self._engine.info.vocab_size, 1000 * self._seed + self._num_begun
        [prompt] = random_prompts(1, input_len=CHAT_PROMPT_TOKENS, vocab_size=vocab_size, seed=seed)
        self._engine.submit(self._engine.make_request(name, prompt, _sampling(max_tokens)))
        self._open.add(name)


def _sampling(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=0, ignore_eos=True)


def add_fairness_command(app: typer.Typer) -> None:
    app.command()(fairness)


def fairness(
    model: Model = None,
    *,
    input_len: Annotated[int, typer.Option(min=64, help="tokens of the long prompt")] = 16_384,
    num_cached: Annotated[int, typer.Option(min=0, help="of these are computed before")] = 0,
    num_chats: Annotated[int, typer.Option(min=1)] = 16,
    step_stretch: Annotated[str, typer.Option(help="several: 2,1e9")] = "2,1e9",
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option()] = "float32",
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json: Json = None,
) -> None:
    """Time between tokens of short chats, alone and beside one long prompt; a model of config.json alone."""
    with needs_engine():
        from relevo.engine.config import EngineConfig
        from relevo.engine.engine import Engine
    results = []
    with spinner("model") as update:
        for stretch in numbers("--step-stretch", step_stretch):
            config = EngineConfig(
                model=model,
                dtype=dtype,
                load_format="dummy",
                step_stretch=stretch,
                threads=threads,
                kv_cache_memory=2 << 30,
            )
            update(f"step_stretch {stretch:g}")
            results.append(
                measure_fairness(
                    Engine(config),
                    step_stretch=stretch,
                    num_chats=num_chats,
                    input_len=input_len,
                    num_cached=num_cached,
                    seed=seed,
                )
            )
    table = Table(
        title=f"one prompt of {input_len} tokens beside {num_chats} chats: ms between a chat's tokens, p50/p99"
    )
    for heading in ("step_stretch", "alone", "beside it", "p99, times", "its TTFT, s"):
        table.add_column(heading)
    for result in results:
        table.add_row(
            f"{result.step_stretch:g}",
            f"{result.itl_p50_alone_ms:.1f}/{result.itl_p99_alone_ms:.1f}",
            f"{result.itl_p50_ms:.1f}/{result.itl_p99_ms:.1f}",
            f"{result.stretch_p99:.2f}",
            f"{result.ttft_seconds:.1f}",
        )
    Console().print(table)
    write_json(json, [asdict(result) for result in results])
