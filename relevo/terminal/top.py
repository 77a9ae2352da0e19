"""relevo top: an endpoint's fleet and its requests as tables, from the router's /debug/fleet."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from relevo.core.errors import NotFound, RelevoError, Unavailable
from relevo.terminal.endpoint import Endpoint

PATH = "/debug/fleet"
_MAX_FAILURE_SECONDS = 60.0  # a router that is started again comes back before that
_PLAIN_STATES = (None, "placing", "waiting", "ended", "stop", "length", "closed")
_WIDE, _MEDIUM = 140, 100  # characters, of the terminal
_STATES = {"ready": "green", "serving": "green", "draining": "yellow", "leaving": "yellow", "streaming": "green"}

Snapshot = Mapping[str, Any]


def look(endpoint: Endpoint) -> Snapshot:
    """The fleet, now. Raises NotFound where the endpoint is no Relevo of this version."""
    try:
        found = endpoint.get_json(PATH)
    except NotFound as error:
        raise NotFound(f"{endpoint.url} has no {PATH}: is it Relevo, of this version?") from error
    if not isinstance(found, dict) or not isinstance(found.get("router"), dict):
        raise Unavailable(f"{endpoint.url}{PATH} tells of no router: is it Relevo, of this version?")
    return found


def show_once(endpoint: Endpoint, console: Console, max_requests: int, *, as_json: bool) -> None:
    snapshot = look(endpoint)
    if as_json:
        print(json.dumps(snapshot))
    else:
        console.print(render(endpoint.url, snapshot, max_requests, console.width))


def watch(
    endpoint: Endpoint,
    console: Console,
    interval_seconds: float,
    max_requests: int | None,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Until Ctrl-C. A router that is away for a moment is waited for; raises the error of one that stays away.

    max_requests: None: as many as fit below the workers
    """
    failing_since: float | None = None
    shown: RenderableType = render(endpoint.url, look(endpoint), _room(console, max_requests, {}), console.width)
    with Live(shown, console=console, screen=True, auto_refresh=False) as live:
        while True:
            wait(interval_seconds)
            try:
                snapshot = look(endpoint)
                shown = render(endpoint.url, snapshot, _room(console, max_requests, snapshot), console.width)
                failing_since = None
                live.update(shown, refresh=True)
            except RelevoError as error:
                failing_since = failing_since or time.monotonic()
                if time.monotonic() - failing_since > _MAX_FAILURE_SECONDS:
                    raise
                live.update(Group(Text(error.message, style="red"), shown), refresh=True)


def render(url: str, snapshot: Snapshot, max_requests: int, width: int) -> RenderableType:
    """What is not in the snapshot is a dash."""
    parts: list[RenderableType] = [_head(url, snapshot), "", _workers(snapshot.get("workers") or [])]
    if agents := snapshot.get("agents"):
        parts += ["", _agents(agents)]
    if max_requests > 0:
        parts += ["", _requests(snapshot, max_requests, width)]
    return Group(*parts)


def _room(console: Console, max_requests: int | None, snapshot: Snapshot) -> int:
    if max_requests is not None:
        return max_requests
    others = len(snapshot.get("workers") or []) + len(snapshot.get("agents") or [])
    return max(3, console.height - others - 9)


def _head(url: str, snapshot: Snapshot) -> RenderableType:
    router, sample = snapshot["router"], snapshot.get("sample") or {}
    ready = Text("ready", "green") if router.get("ready") else Text("not ready", "red")
    models = ", ".join(map(str, router.get("models") or []))
    first = Text.assemble(f"relevo {router.get('version', '')} at {url}, {models}: ", ready)
    first.append(f"   up {_duration(_number(snapshot.get('at')) - _number(router.get('started_at')))}")
    second = Text(
        f"running {_count(router.get('num_running'))}, queued {_count(router.get('num_queued'))}   "
        f"{_count(sample.get('requests_per_second'), 1)} requests/s, "
        f"{_count(sample.get('prompt_tokens_per_second'))} tokens/s in, "
        f"{_count(sample.get('output_tokens_per_second'))} out   "
        f"TTFT p50 {_count(sample.get('ttft_p50'))} p95 {_count(sample.get('ttft_p95'))} ms   "
        f"TPOT p50 {_count(sample.get('tpot_p50'), 1)} p95 {_count(sample.get('tpot_p95'), 1)} ms"
    )
    trouble = [Text(str(router["trouble"]), "red")] if router.get("trouble") else []
    return Group(first, second, *trouble)


def _workers(workers: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("worker", "role", "state", right=("run", "wait", "wait tokens", "KV", "in/s", "out/s", "step ms"))
    for worker in sorted(workers, key=lambda each: (str(each.get("role")) != "prefill", str(each.get("id")))):
        flow, total = worker.get("flow") or {}, _number(worker.get("num_blocks"))
        used = total - _number(worker.get("num_free_blocks"))
        table.add_row(
            _text(worker.get("id")),
            _text(worker.get("role")),
            _state(worker.get("state"), worker.get("complaint")),
            _count(worker.get("num_running")),
            _count(worker.get("num_waiting")),
            _count(worker.get("num_waiting_tokens")),
            _share(used, total),
            _count(flow.get("computed_tokens_per_second")),
            _count(flow.get("output_tokens_per_second")),
            _count(worker.get("step_ms"), 1),
        )
    return table


def _agents(agents: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("agent", "state", right=("arena", "sealed", "pinned", "writers", "readers", "in", "out MB/s"))
    for agent in agents:
        slots, flow = agent.get("slots") or {}, agent.get("flow") or {}
        total = _number(slots.get("num_slots"))
        table.add_row(
            _text(agent.get("address")),
            _state(agent.get("state"), None),
            _share(total - _number(slots.get("num_free")), total),
            _count(slots.get("num_sealed")),
            _count(slots.get("num_pinned")),
            _count(agent.get("num_writers")),
            _count(agent.get("num_readers")),
            _megabytes(flow.get("in_bytes_per_second")),
            _megabytes(flow.get("out_bytes_per_second")),
        )
    return table


def _requests(snapshot: Snapshot, max_requests: int, width: int) -> Table:
    """The latest first, as the router tells them. Where it is narrow ids are cut, and columns left out."""
    names = {worker.get("address"): worker.get("id") for worker in snapshot.get("workers") or []}
    headings = ["age s", "prompt", "output", "TTFT ms", "TPOT ms"]
    more = ["cached", "total ms", "tries"] if width >= _MEDIUM else []
    table = _table("request", "state", "prefill", "decode", right=headings + more)
    for request in (snapshot.get("requests") or [])[:max_requests]:
        prefill, decode = request.get("prefill"), request.get("decode")
        figures = {
            "age s": _count(_number(snapshot.get("at")) - _number(request.get("placed_at")), 1),
            "prompt": _count(request.get("num_prompt_tokens")),
            "output": _count(request.get("num_output_tokens")),
            "TTFT ms": _count(request.get("ttft_ms")),
            "TPOT ms": _count(request.get("tpot_ms"), 1),
            "cached": _count(request.get("num_cached_tokens")),
            "total ms": _count(request.get("total_ms")),
            "tries": _count(request.get("num_tries")),
        }
        table.add_row(
            _text(_short(str(request.get("id"))) if width < _WIDE else request.get("id")),
            _state(request.get("outcome") or request.get("state"), None),
            _text(names.get(prefill, prefill)),
            _text(names.get(decode, decode)),
            *(figures[heading] for heading in headings + more),
        )
    return table


def _short(request_id: str) -> str:
    """Enough to tell one from the others."""
    request_id = request_id.removeprefix("chatcmpl-").removeprefix("cmpl-")
    return request_id if len(request_id) <= 9 else f"{request_id[:8]}…"


def _table(*left: str, right: Sequence[str]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in left:
        table.add_column(heading, no_wrap=True, overflow="ellipsis")
    for heading in right:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _state(state: Any, complaint: Any) -> Text:
    text = f"{state or '–'}: {complaint}" if complaint else str(state or "–")
    return Text(text, _STATES.get(str(state), "" if state in _PLAIN_STATES else "red"))


def _text(value: Any) -> Text:
    """Text, not markup: names may have brackets in them."""
    return Text("–" if value is None else str(value))


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _count(value: Any, digits: int = 0) -> str:
    return f"{value:,.{digits}f}" if isinstance(value, int | float) else "–"


def _megabytes(value: Any) -> str:
    return f"{value / 1e6:,.1f}" if isinstance(value, int | float) else "–"


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "–"


def _duration(seconds: float) -> str:
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if days >= 2:
        return f"{days:.0f} d"
    if hours >= 2:
        return f"{hours:.0f} h"
    return f"{minutes:.0f} min" if minutes >= 2 else f"{max(0.0, seconds):.0f} s"
