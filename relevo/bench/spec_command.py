"""relevo bench spec: what drafts bring."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from relevo.bench.commands import integers, needs_engine, spinner, write_json
from relevo.bench.engine_commands import Json
from relevo.bench.tables import make_table

if TYPE_CHECKING:
    from relevo.bench.spec import SpecResult
    from relevo.engine.engine import Engine
    from relevo.engine.spec_decode.speculator import Speculator

WORKLOADS = ("demo", "shape", "edit")


def add_spec_command(app: typer.Typer) -> None:
    app.command()(spec)


def spec(
    *,
    workload: Annotated[
        str, typer.Option(help="several: demo (the bundled pair), shape (a draft of set agreement), edit (a file)")
    ] = "demo,shape,edit",
    shape: Annotated[Path, typer.Option(help="config.json of the target in shape and edit; random weights")] = Path(
        "bench/shapes/qwen2.5-0.5b"
    ),
    agreement: Annotated[
        float, typer.Option(min=0, max=1, help="how often a draft in `shape` is what the target says")
    ] = 0.8,
    concurrency: Annotated[str, typer.Option(help="requests that come together; several: 1,8")] = "1,8",
    temperature: Annotated[str, typer.Option(help="several: 0,0.8")] = "0,0.8",
    output_len: Annotated[int, typer.Option(min=2, help="tokens in an answer")] = 192,
    num_rounds: Annotated[int, typer.Option(min=1, help="measured; one more goes before")] = 3,
    num_speculative_tokens: Annotated[int | None, typer.Option(min=1, max=32, help="drafts a step, at most")] = None,
    adaptive_speculation: Annotated[bool, typer.Option(help="draft only where it is measured to pay")] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: one a core that there is for us")] = None,
    transformers: Annotated[
        bool, typer.Option(help="also transformers' assisted generation, with the demo pair")
    ] = True,
    json: Json = None,
) -> None:
    """Tokens a second with drafts against without, alternately in one engine, whose prompts are in its cache."""
    workloads = [name.strip() for name in workload.split(",")]
    if unknown := [name for name in workloads if name not in WORKLOADS]:
        raise typer.BadParameter(f"--workload {unknown[0]!r}: give some of {', '.join(WORKLOADS)}")
    levels = integers("--concurrency", concurrency)
    temperatures = _temperatures(temperature)
    with needs_engine():
        from relevo.bench.spec import AgreeingProposer, bench_spec, scripted
    from relevo.bench.spec_workloads import edit_script, held_out_prompts, random_script

    options = {
        "num_speculative_tokens": num_speculative_tokens,
        "adaptive_speculation": adaptive_speculation,
        "threads": threads,
    }
    results: list[SpecResult] = []

    def measure(name: str, engine: Engine, speculators: dict[str, Speculator], prompts: list[list[int]]) -> None:
        for level in levels:
            for degree in temperatures:
                update(f"{name}, {level} at once, temperature {degree:g}")
                results.extend(
                    bench_spec(
                        engine,
                        name,
                        speculators,
                        prompts[:level],
                        temperature=degree,
                        output_len=output_len,
                        num_rounds=num_rounds,
                    )
                )

    peers: list[dict[str, Any]] = []
    with spinner("starting") as update, tempfile.TemporaryDirectory() as folder:
        if "demo" in workloads:
            engine, make = _engine({"speculative": "draft:demo", **options})
            speculators = {kind: make(kind) for kind in ("draft:demo", "ngram", "suffix")}
            prompts = held_out_prompts(max(levels))
            measure("demo", engine, speculators, prompts)
            if transformers:
                from relevo.bench.spec_peer import assisted_generation

                for degree in temperatures:
                    update(f"transformers, temperature {degree:g}")
                    peers.append(assisted_generation(prompts[0], degree, output_len, num_rounds))
        if {"shape", "edit"} & set(workloads):
            from relevo.bench.spec_workloads import draft_folder

            draft = f"draft:{draft_folder(shape, Path(folder))}"
            dummy = {"model": str(shape), "load_format": "dummy", "max_model_len": 8192}
            update("random weights")
            engine, make = _engine({"speculative": draft, **dummy, **options})
            if "shape" in workloads:
                prompts, script = random_script(max(levels), output_len)
                speculator = make(draft)
                speculator.proposer = AgreeingProposer(speculator.proposer, script, agreement)
                with scripted(engine, script):
                    measure(f"shape, agreement {agreement:g}", engine, {"draft": speculator}, prompts)
            if "edit" in workloads:
                prompts, script = edit_script(max(levels))
                with scripted(engine, script):
                    measure("edit", engine, {kind: make(kind) for kind in ("ngram", "suffix")}, prompts)
    console = Console()
    console.print(_table(results))
    for peer in peers:
        console.print(
            f"transformers, demo pair, float32, temperature {peer['temperature']:g}: "
            f"{peer['plain_tokens_per_second']:.0f} tok/s, assisted {peer['assisted_tokens_per_second']:.0f}, "
            f"x {peer['ratio']:.2f}"
        )
    write_json(json, {"relevo": [result.as_dict() for result in results], "transformers": peers})


def _engine(options: dict[str, Any]) -> tuple[Engine, Callable[[str], Speculator]]:
    """An engine, and what makes speculators for it: with its own draft model, or with those that need none."""
    from relevo.engine.config import EngineConfig
    from relevo.engine.engine import Engine
    from relevo.engine.spec_decode.make import make_speculator

    config = EngineConfig(**options)
    engine = Engine(config)
    own = engine.speculator
    assert own is not None

    def make(kind: str) -> Speculator:
        if kind == config.speculative:
            return own
        sized = config.on(engine.runner.forward.device.type)
        return make_speculator(replace(sized, speculative=kind), engine.runner, None)

    return engine, make


def _temperatures(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 0:
        raise typer.BadParameter(f"--temperature {text!r}: give numbers from 0 on, e.g. 0,0.8")
    return values


def _table(results: list[SpecResult]) -> Any:
    headings = [
        "workload",
        "drafts",
        "at once",
        "temp.",
        "plain tok/s",
        "tok/s",
        "x",
        "worst",
        "tokens/step",
        "accepted",
        "equal",
    ]
    rows = [
        [
            result.workload,
            result.proposer,
            f"{result.concurrency}",
            f"{result.temperature:g}",
            f"{result.plain_tokens_per_second:.0f}",
            f"{result.tokens_per_second:.0f}",
            f"{result.ratio:.2f}",
            f"{result.worst_ratio:.2f}",
            f"{result.acceptance_length:.2f}",
            f"{100 * result.accepted:.0f} %",
            "yes" if result.outputs_are_equal else "NO",
        ]
        for result in results
    ]
    return make_table("Speculative against plain decoding", headings, rows)
