"""relevo bench handover."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from relevo.bench.commands import integers, spinner, write_json
from relevo.core.sizes import format_size
from relevo.engine_options import EngineOptions, decode_flags, parse_size_option, takes_engine_options, worker_flags

if TYPE_CHECKING:
    from relevo.bench.handover import HandoverCase


def add_handover_command(app: typer.Typer) -> None:
    app.command()(takes_engine_options(handover))


def handover(
    model: Annotated[
        str | None, typer.Argument(help="Hugging Face id or local folder; nothing: the bundled demo model")
    ] = None,
    *,
    engine: EngineOptions,
    input_len: Annotated[str, typer.Option(help="tokens of a prompt; several: 256,2048,16384")] = "256,2048",
    num_requests: Annotated[int, typer.Option(min=1, help="of each length, one by one, and one more before")] = 4,
    vocab_size: Annotated[int, typer.Option(min=2, help="token ids of prompts are below this")] = 1000,
    kv_arena: Annotated[str, typer.Option(metavar="SIZE", help="shared memory for blocks on their way")] = "1GiB",
    port: Annotated[int, typer.Option(min=1, max=65535, help="port of the stack's HTTP endpoint")] = 8000,
    json: Annotated[Path | None, typer.Option(help="also write the figures to this file")] = None,
) -> None:
    """What handing KV over costs a request: a split stack, and then an aggregated one, with the same prompts."""
    import uvloop

    from relevo.bench.handover import HandoverBenchConfig, as_dicts, bench_handover
    from relevo.stack import StackConfig

    config = HandoverBenchConfig(
        stack=StackConfig(
            model=model,
            port=port,
            kv_arena=str(parse_size_option("--kv-arena", kv_arena)),
            worker_options=worker_flags(engine),
            decode_options=decode_flags(engine),
            restart=False,
        ),
        input_lens=integers("--input-len", input_len),
        num_requests=num_requests,
        vocab_size=vocab_size,
    )
    with spinner("measuring") as tell:
        cases = uvloop.run(bench_handover(config, tell))
    Console().print(handover_table(cases))
    write_json(json, as_dicts(cases))


def handover_table(cases: list[HandoverCase]) -> Table:
    caption = (
        "tail: from the first token to the last block in decode's pool; second: token, after the first; (): aggregated"
    )
    table = Table(title="what the hand-over costs", caption=caption)
    for heading in ("prompt", "KV", "TTFT ms", "÷ ()", "tail ms", "% TTFT", "overlap", "second ms"):
        table.add_column(heading, justify="right")
    for case in cases:
        table.add_row(
            str(case.input_len),
            format_size(round(case.num_bytes)),
            f"{case.ttft_ms:.0f} ({case.aggregated_ttft_ms:.0f})",
            f"{case.ttft_ms / case.aggregated_ttft_ms:.2f}",
            f"{case.tail_ms:.1f}",
            f"{100 * case.tail_share:.2f}",
            f"{case.overlap:.2f}",
            f"{case.second_token_ms:.0f} ({case.aggregated_second_token_ms:.0f})",
        )
    return table
