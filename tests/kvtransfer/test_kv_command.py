"""relevo kv, as a user runs it, against real agents."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from services.kvtransfer.agent import Agent

from .blocks import BLOCK_BYTES, NUM_SLOTS, names, publish_all, until, until_unused
from .conftest import Connect, StartAgent


async def relevo_kv(*arguments: str, token: str = "") -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RELEVO_")}
    if token:
        environment["RELEVO_KV_TOKEN"] = token
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "relevo.cli", "kv", *arguments), stdout=-1, stderr=-1, env=environment
    )
    out, error = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), error.decode()


async def answer(*arguments: str) -> Any:
    code, out, error = await relevo_kv(*arguments, "--json")
    assert (code, error) == (0, "")
    return json.loads(out)


async def publish_to_disk(agent: Agent, client: Any, *labels: object) -> None:
    await publish_all(client, *labels)
    [disk] = agent.tiers.tiers
    await until(lambda: disk.counters.stored == len(labels))
    await until_unused(agent)


async def test_stats_and_ls_show_each_tier(start: StartAgent, connect: Connect, tmp_path: Path) -> None:
    agent = await start(kv_disk=tmp_path / "kv")
    client = await connect(agent.address)
    await publish_to_disk(agent, client, "a", "b", "c")
    arena, disk = await answer("stats", "--agent", agent.address)
    assert (arena["tier"], arena["blocks"], arena["bytes"], arena["stored"]) == ("arena", 3, 3 * BLOCK_BYTES, 3)
    assert (disk["tier"], disk["blocks"], disk["place"], disk["trouble"]) == ("disk", 3, str(tmp_path / "kv"), "")
    async with client.fetch(names("b"), timeout_seconds=5) as fetch, client.publish(names("new")):
        await anext(fetch)
        held = await answer("ls", "--agent", agent.address)
    assert {(row["tier"], row["name"]) for row in held} == {
        *(("arena", name.hex()) for name in names("a", "b", "c", "new")),
        *(("disk", name.hex()) for name in names("a", "b", "c")),
    }
    in_use = {row["name"]: row["in_use"] for row in held if row["tier"] == "arena"}
    assert [in_use[name.hex()] for name in names("a", "b", "new")] == ["", "pinned", "written"]
    assert len(await answer("ls", "--agent", agent.address, "--tier", "disk", "--limit", "2")) == 2
    code, out, _ = await relevo_kv("stats", "--agent", agent.address)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["tier", "arena", "disk"]
    code, out, _ = await relevo_kv("ls", "--agent", agent.address, "--tier", "arena")
    assert {line.split()[-1] for line in out.splitlines()} == {name.hex() for name in names("a", "b", "c")}


async def test_clear_keeps_what_is_in_use(start: StartAgent, connect: Connect, tmp_path: Path) -> None:
    agent = await start(kv_disk=tmp_path / "kv")
    client = await connect(agent.address)
    await publish_to_disk(agent, client, "a", "b", "c")
    async with client.fetch(names("a"), timeout_seconds=5) as fetch, client.publish(names("new")):
        await anext(fetch)
        assert await answer("clear", "--agent", agent.address, "--tier", "arena") == [
            {"tier": "arena", "cleared": 2, "kept": 2}
        ]
        audit = agent.store.table.audit()
        assert (audit.num_granted, audit.num_pinned, audit.num_free) == (1, 1, NUM_SLOTS - 2)
    assert await answer("clear", "--agent", agent.address, "--tier", "disk") == [
        {"tier": "disk", "cleared": 3, "kept": 0}
    ]
    code, out, _ = await relevo_kv("clear", "--agent", agent.address)
    assert (code, out) == (0, "arena: 1 blocks forgotten\ndisk: 0 blocks forgotten\n")
    await until_unused(agent)
    assert agent.store.table.audit().num_free == NUM_SLOTS


async def test_errors_are_one_line(start: StartAgent) -> None:
    token = "0123456789abcdef"
    agent = await start(kv_token=token)
    for arguments, reason in (
        (("stats", "--agent", "127.0.0.1:1"), "no KV agent answers at --agent 127.0.0.1:1"),
        (("ls", "--agent", "nowhere"), "host:port is, such as 127.0.0.1:50051"),
        (("ls", "--agent", agent.address), "set RELEVO_KV_TOKEN"),
    ):
        code, out, error = await relevo_kv(*arguments)
        assert (code, out) == (1, "")
        [line] = error.splitlines()
        assert line.startswith("relevo: error: ")
        assert reason in line
    for action in ("stats", "ls", "clear"):
        code, _, error = await relevo_kv(action, "--agent", agent.address, "--tier", "redis", token=token)
        assert (code, error.count("\n")) == (1, 1)
        assert "this agent has no tier 'redis': it has arena" in error
