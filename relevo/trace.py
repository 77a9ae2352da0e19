"""`relevo trace`: where one request's time went, as a waterfall in the terminal."""

from __future__ import annotations

import os
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from relevo.core.errors import NotFound, Unavailable

BAR_CHARS = 48
_STYLES = {"router": "cyan", "prefill": "magenta", "decode": "green"}


def trace(
    request_id: Annotated[str, typer.Argument(help="x-request-id of a recent request, or its answer's id")],
    *,
    url: Annotated[str, typer.Option(help="the router")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option(envvar="RELEVO_API_KEY", help="if it asks for one")] = None,
) -> None:
    """Print a recent request's spans and where its time went."""
    headers = {"authorization": f"Bearer {api_key.split(',')[0]}"} if api_key else {}
    try:
        reply = httpx.get(f"{url.rstrip('/')}/debug/route/{request_id}", headers=headers, timeout=10)
    except httpx.HTTPError as error:
        raise Unavailable(f"{url}: {error or type(error).__name__}") from None
    if reply.status_code != 200:
        raise NotFound(f"{url} answers {reply.status_code}: {reply.text[:200]}")
    console = Console(width=None if os.isatty(1) else 140)
    for record in reply.json():
        console.print(waterfall(record))
        console.print(" · ".join(f"{name} {value:.1f}" for name, value in record["timings"].items() if value))


def waterfall(record: dict[str, Any]) -> Table:
    """record: one of /debug/route's"""
    spans = record["spans"]
    length = max([span["start_ms"] + span["duration_ms"] for span in spans] or [0.0]) or 1.0
    table = Table(title=record["request_id"], box=None, pad_edge=False)
    for name in ("span", "", "ms", "from"):
        table.add_column(name, justify="right" if name in ("ms", "from") else "left", no_wrap=True)
    for span in spans:
        depth, parent = 0, span["parent"]
        while parent is not None:
            depth, parent = depth + 1, spans[parent]["parent"]
        first = round(BAR_CHARS * max(0.0, span["start_ms"]) / length)
        width = max(1, round(BAR_CHARS * span["duration_ms"] / length))
        bar = Text(" " * min(first, BAR_CHARS - 1) + "█" * min(width, BAR_CHARS - min(first, BAR_CHARS - 1)))
        bar.stylize(_STYLES.get(span["service"], "white"))
        table.add_row("  " * depth + span["name"], bar, f"{span['duration_ms']:.2f}", f"{span['start_ms']:.2f}")
    return table
