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
    engine: Engine, *, step_stretch: float, num_chats: int, input_len: int, seed: int
) -> FairnessResult:
    """Chats that answer without end; alone for a while, then beside one long prompt until its first token."""
    vocab_size = engine.info.vocab_size
    chats = random_prompts(num_chats, input_len=CHAT_PROMPT_TOKENS, vocab_size=vocab_size, seed=seed)
    for i, prompt in enumerate(chats):
        engine.submit(engine.make_request(f"chat{i}", prompt, _endless(None)))
    for _ in range(30):
        engine.step()
    alone = [_timed_step(engine)[0] for _ in range(200)]
    [long] = random_prompts(1, input_len=input_len, vocab_size=vocab_size, seed=seed + 1)
    engine.submit(engine.make_request("long", long, _endless(1)))
    beside: list[float] = []
    has_first_token = False
    while not has_first_token:
        seconds, has_first_token = _timed_step(engine)
        beside.append(seconds)
    for i in range(num_chats):
        engine.abort(f"chat{i}")
    while engine.has_unfinished_requests:
        engine.step()
    return FairnessResult(
        step_stretch,
        itl_p50_alone_ms=1000.0 * percentile(alone, 50),
        itl_p99_alone_ms=1000.0 * percentile(alone, 99),
        itl_p50_ms=1000.0 * percentile(beside, 50),
        itl_p99_ms=1000.0 * percentile(beside, 99),
        ttft_seconds=sum(beside),
    )


def _timed_step(engine: Engine) -> tuple[float, bool]:
    """Every chat gets a token in every step, so that a step's duration is all chats' time between tokens."""
    started = time.perf_counter()
    result = engine.step()
    return time.perf_counter() - started, any(tokens.request_id == "long" for tokens in result.tokens)


def _endless(max_tokens: int | None) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=0, ignore_eos=True)


def add_fairness_command(app: typer.Typer) -> None:
    app.command()(fairness)


def fairness(
    model: Model = None,
    *,
    input_len: Annotated[int, typer.Option(min=64, help="tokens of the long prompt")] = 16_384,
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
                    Engine(config), step_stretch=stretch, num_chats=num_chats, input_len=input_len, seed=seed
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
