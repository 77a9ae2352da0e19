"""relevo top, of a router's snapshot as it was once taken, and of routers that are none."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from relevo.terminal.top import render
from tests.terminal.fake import FakeEndpoint, running_endpoint
from tests.terminal.terminal import CTRL_C, terminal

pytestmark = pytest.mark.timeout(90)

SNAPSHOT: dict[str, Any] = {
    "at": 1000.0,
    "router": {
        "version": "0.1.0",
        "models": ["some-model"],
        "started_at": 700.0,
        "ready": True,
        "trouble": None,
        "num_running": 3,
        "num_queued": 1,
    },
    "workers": [
        {
            "id": "decode-0",
            "role": "decode",
            "address": "127.0.0.1:2",
            "state": "stuck",
            "complaint": "in one step [for] 31 s",
            "num_blocks": 200,
            "num_free_blocks": 150,
            "num_running": 2,
            "num_waiting": 0,
            "num_waiting_tokens": 0,
            "step_ms": 12.34,
            "flow": {"computed_tokens_per_second": 0.0, "output_tokens_per_second": 81.0},
        },
        {"id": "prefill-0", "role": "prefill", "address": "127.0.0.1:1", "state": "ready", "num_waiting_tokens": 4321},
    ],
    "agents": [
        {
            "address": "127.0.0.1:3",
            "state": "serving",
            "slots": {"num_slots": 100, "num_free": 60, "num_sealed": 38, "num_pinned": 5},
            "num_writers": 1,
            "num_readers": 2,
            "flow": {"in_bytes_per_second": 2_500_000, "out_bytes_per_second": 0},
        },
        {"address": "127.0.0.1:4", "state": "lost", "slots": None},
    ],
    "requests": [
        {
            "id": f"chatcmpl-{number}",
            "placed_at": 998.5 - number,
            "state": "streaming",
            "outcome": None,
            "prefill": "127.0.0.1:1",
            "decode": "127.0.0.1:2",
            "num_prompt_tokens": 1024,
            "num_cached_tokens": 512,
            "num_output_tokens": 7,
            "ttft_ms": 123.4,
            "tpot_ms": 12.3,
            "total_ms": None,
            "num_tries": 2,
        }
        for number in range(30)
    ],
    "sample": {"ttft_p50": 120.0, "ttft_p95": None, "tpot_p50": 12.0, "output_tokens_per_second": 81.0},
}


@pytest.fixture
def endpoint() -> Iterator[FakeEndpoint]:
    with running_endpoint() as endpoint:
        endpoint.pages["/debug/fleet"] = (200, SNAPSHOT)
        yield endpoint


def top(endpoint: FakeEndpoint, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "relevo.cli", "top", "--url", endpoint.url, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def row(printed: str, name: str) -> list[str]:
    [line] = [line for line in printed.splitlines() if line.startswith(name)]
    return line.split()


def test_once_prints_workers_agents_and_requests(endpoint: FakeEndpoint) -> None:
    result = top(endpoint, "--once", "--requests", "2", "--api-key", "secret")
    assert result.returncode == 0, result.stderr
    assert endpoint.headers[-1]["authorization"] == "Bearer secret"
    printed = result.stdout
    assert "some-model: ready   up 5 min" in printed
    assert "running 3, queued 1" in printed
    assert "81 out   TTFT p50 120 p95 – ms" in printed
    assert printed.index("prefill-0 ") < printed.index("decode-0 "), "in the order of a request's way"
    decode = row(printed, "decode-0")
    assert decode[1:4] == ["decode", "stuck:", "in"]
    assert decode[-8:] == ["2", "0", "0", "25", "%", "0", "81", "12.3"]
    assert row(printed, "prefill-0")[3:] == ["–", "–", "4,321", "–", "–", "–", "–"], "what is not told is a dash"
    assert row(printed, "127.0.0.1:3")[1:] == ["serving", "40", "%", "38", "5", "1", "2", "2.5", "0.0"]
    assert row(printed, "127.0.0.1:4")[1:3] == ["lost", "–"]
    columns = ["streaming", "prefill-0", "decode-0", "1.5", "1,024", "7", "123", "12.3", "512", "–", "2"]
    assert row(printed, "chatcmpl-0")[1:] == columns
    assert "chatcmpl-1 " in printed
    assert "chatcmpl-2 " not in printed


def test_narrow_terminals_get_less_and_whole() -> None:
    requests = [{**SNAPSHOT["requests"][0], "id": f"chatcmpl-{number}0123456789abcdef"} for number in range(3)]
    console = Console(width=80, file=io.StringIO())
    console.print(render("http://127.0.0.1:8000", {**SNAPSHOT, "requests": requests}, 2, console.width))
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    assert row(printed, "00123456…") == [
        *("00123456…", "streaming", "prefill-0", "decode-0", "1.5", "1,024", "7", "123", "12.3")
    ]
    assert row(printed, "10123456…")


def test_json_is_the_snapshot(endpoint: FakeEndpoint) -> None:
    result = top(endpoint, "--json")
    assert (result.returncode, json.loads(result.stdout)) == (0, SNAPSHOT)


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ((404, {"error": {"message": "Not Found"}}), "has no /debug/fleet: is it Relevo, of this version?"),
        ((200, ["a list"]), "tells of no router"),
        ((401, {"error": {"message": "no key"}}), "no key (give --api-key, or RELEVO_API_KEY)"),
    ],
)
def test_no_relevo_is_one_line(endpoint: FakeEndpoint, page: tuple[int, Any], said: str) -> None:
    endpoint.pages["/debug/fleet"] = page
    result = top(endpoint, "--once")
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert line.startswith("relevo: error: ")
    assert said in line


def test_terminal_shows_what_changes_until_ctrl_c(endpoint: FakeEndpoint) -> None:
    with terminal("top", "--url", endpoint.url, "--interval", "0.2", COLUMNS="150", LINES="24") as user:
        user.expect("some-model: ready")
        shown = user.expect("chatcmpl-2")
        assert "running 3, queued 1" in shown
        router = SNAPSHOT["router"] | {"ready": False, "trouble": "no decode worker", "num_running": 9}
        endpoint.pages["/debug/fleet"] = (200, {**SNAPSHOT, "router": router, "workers": []})
        assert "not ready" in user.expect("running 9, queued 1")
        user.expect("no decode worker")
        endpoint.pages["/debug/fleet"] = (503, {"error": {"message": "the router is shutting down"}})
        user.expect("503: the router is shutting down")
        user.expect("running 9, queued 1")
        endpoint.pages["/debug/fleet"] = (200, SNAPSHOT)
        user.expect("running 3, queued 1")
        user.type(CTRL_C)
        code, said = user.end()
        assert code == 0
        assert "Traceback" not in said
