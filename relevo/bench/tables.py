"""What the commands print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from relevo.bench.ceiling import Machine
    from relevo.bench.engine import LatencyResult, ThroughputResult
    from relevo.bench.model_ceiling import Ceiling
    from relevo.bench.serve import ServeBenchResult


def make_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """All columns to the right, no line broken."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def serve_table(title: str, results: Sequence[ServeBenchResult]) -> Table:
    """Times as p50/p99 in milliseconds."""
    with_goodput = any(result.goodput_requests_per_second is not None for result in results)
    headings = ["load", "TTFT ms", "TPOT ms", "ITL ms", "e2e ms", "tok/s", "req/s"]
    headings += ["goodput/s"] * with_goodput
    rows = []
    for result in results:
        load = f"{result.concurrency}" if result.request_rate is None else f"{result.request_rate:g}/s"
        times = [
            f"{result.figures[f'{name}_ms_p50']:.1f}/{result.figures[f'{name}_ms_p99']:.1f}"
            for name in ("ttft", "tpot", "itl", "e2e")
        ]
        rates = [f"{result.output_tokens_per_second:.1f}", f"{result.requests_per_second:.2f}"]
        if with_goodput:
            rates.append(f"{result.goodput_requests_per_second or 0.0:.2f}")
        rows.append([load, *times, *rates])
    return make_table(title, headings, rows)


def serve_remarks(results: Sequence[ServeBenchResult]) -> list[str]:
    """What a reader of the table must know, if anything."""
    remarks = []
    for result in results:
        load = f"concurrency {result.concurrency}" if result.request_rate is None else f"{result.request_rate:g}/s"
        for reason, count in result.failures.items():
            remarks.append(f"{load}: {count} failed: {reason}")
        if result.num_short:
            remarks.append(f"{load}: {result.num_short} answers were shorter than asked for")
        if result.tokens_per_chunk > 1.02:
            remarks.append(f"{load}: {result.tokens_per_chunk:.2f} tokens a chunk; compare TPOT rather than ITL")
        if result.client_cpu_share > 0.5:
            remarks.append(f"{load}: the client itself took {result.client_cpu_share:.0%} of a core")
    return remarks


def serve_ceiling_table(
    results: Sequence[ServeBenchResult], ceiling: Ceiling, input_len: int, output_len: int
) -> Table:
    """The machine's own times, and measured medians as multiples of them; of closed loops only."""
    headings = ["load", "TTFT ms", "measured", "TPOT ms", "measured", "tok/s", "measured"]
    rows = []
    for result in results:
        level = result.concurrency
        if level is None or result.request_rate is not None:
            continue
        ttft, tpot = ceiling.ttft_ms(input_len), ceiling.tpot_ms(level, input_len + output_len / 2)
        rate = ceiling.tokens_per_second(level, input_len, output_len)
        # Requests wait for each other's prompts: only alone is TTFT the machine's business.
        ratio = f"{result.figures['ttft_ms_p50'] / ttft:.2f} x" if level == 1 else ""
        rows.append(
            [
                str(level),
                f"{ttft:.1f}" if level == 1 else "",
                ratio,
                f"{tpot:.1f}",
                f"{result.figures['tpot_ms_p50'] / tpot:.2f} x",
                f"{rate:.1f}",
                f"{result.output_tokens_per_second / rate:.2f} x",
            ]
        )
    return make_table(f"What the machine allows for {ceiling.model.name}, {ceiling.dtype}", headings, rows)


def latency_table(results: Sequence[LatencyResult], ceiling: Ceiling | None) -> Table:
    first = results[0]
    headings = ["batch", "prefill ms", "tok/s", "TPOT ms", "step ms", "tok/s"] + ["of the ceiling"] * bool(ceiling)
    rows = []
    for result in results:
        figures = result.figures
        row = [
            str(result.batch_size),
            f"{figures['prefill_ms_p50']:.1f}",
            f"{result.prefill_tokens_per_second:.0f}",
            f"{figures['tpot_ms_p50']:.1f}/{figures['tpot_ms_p99']:.1f}",
            f"{figures['step_ms_p50']:.1f}/{figures['step_ms_p99']:.1f}",
            f"{result.output_tokens_per_second:.1f}",
        ]
        if ceiling is not None:
            allowed = ceiling.tpot_ms(result.batch_size, result.input_len + result.output_len / 2)
            row.append(f"TPOT {figures['tpot_ms_p50'] / allowed:.2f} x")
        rows.append(row)
    return make_table(f"{first.input_len} tokens in, {first.output_len} out; p50/p99", headings, rows)


def throughput_table(result: ThroughputResult) -> Table:
    headings = ["requests", "tokens in", "out", "seconds", "req/s", "tok/s in", "out"]
    row = [str(result.num_requests), str(result.num_input_tokens), str(result.num_output_tokens)]
    row += [f"{result.seconds:.2f}", f"{result.requests_per_second:.2f}"]
    row += [f"{result.input_tokens_per_second:.1f}", f"{result.output_tokens_per_second:.1f}"]
    return make_table("All requests at once", headings, [row])


def ceiling_tables(
    machine: Machine, ceiling: Ceiling | None, concurrency: Sequence[int], input_len: int, output_len: int
) -> list[Table]:
    best = set(machine.gemms)
    rows = [
        [
            each.dtype,
            each.implementation,
            str(each.rows),
            f"{each.gflops_per_second:.1f}",
            f"{each.weight_gb_per_second:.1f}",
            "best" if each in best else "",
        ]
        for each in machine.all
    ]
    title = f"{machine.num_threads} threads, copy {machine.copy_gb_per_second:.1f} GB/s, "
    title += f"read {machine.read_gb_per_second:.1f} GB/s"
    tables = [make_table(title, ["dtype", "product", "rows", "GFLOP/s", "GB/s", ""], rows)]
    if ceiling is not None:
        rows = [
            [
                str(level),
                f"{ceiling.ttft_ms(input_len):.1f}" if level == 1 else "",
                f"{ceiling.tpot_ms(level, input_len + output_len / 2):.1f}",
                f"{ceiling.tokens_per_second(level, input_len, output_len):.1f}",
            ]
            for level in concurrency
        ]
        title = f"{ceiling.model.name}, {ceiling.dtype}, {input_len} in, {output_len} out: at best"
        tables.append(make_table(title, ["concurrency", "TTFT ms", "TPOT ms", "tok/s"], rows))
    return tables
