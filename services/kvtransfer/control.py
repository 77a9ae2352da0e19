"""python -m services.kvtransfer.control: asks an agent what it holds, for people. `relevo kv` runs it."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field
from rich.console import Console
from rich.table import Table

from relevo.core.errors import InvalidRequest, RelevoError, Unavailable
from relevo.core.sizes import parse_size
from services.common.config import parse_settings
from services.common.errors import relevo_errors
from services.common.grpc import make_channel
from services.common.security import PeerSettings, read_security
from services.kvtransfer.inspection import ARENA
from services.pb import kvtransfer_pb2, kvtransfer_pb2_grpc

_ANSWER_SECONDS = 5.0
_CLEAR_SECONDS = 60.0  # a large directory takes a while


class ControlSettings(PeerSettings, cli_prog_name="relevo-kv"):
    """Ask a KV transfer agent what it holds."""

    action: Literal["ls", "stats", "clear"] = Field(description="what to do")
    agent: str = Field(description="the agent's address")
    tier: str = Field("", description="this tier alone")
    limit: int = Field(100, ge=1, description="blocks listed of each tier")
    as_json: bool = Field(False, description="print JSON")


def main() -> None:
    """A failure is one line on stderr, and exit code 1."""
    try:
        settings = parse_settings(ControlSettings)
        asyncio.run(ask(settings))
    except RelevoError as error:
        print(f"relevo: error: {' '.join(error.message.split())}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # `| head` has seen enough
        sys.stderr.close()


async def ask(settings: ControlSettings) -> None:
    """Do it and print the answer. Raises RelevoError."""
    security = read_security(settings)
    host, _, port = settings.agent.rpartition(":")
    if not host or not port.isdigit():
        raise InvalidRequest(f"--agent {settings.agent!r} is no address: host:port is, such as 127.0.0.1:50051")
    async with make_channel(settings.agent, security) as channel:
        stub = kvtransfer_pb2_grpc.KvTransferStub(channel)
        try:
            with relevo_errors(f"kvtransfer agent {settings.agent}"):
                rows = await _ROWS[settings.action](stub, settings)
        except Unavailable as error:
            raise Unavailable(f"no KV agent answers at --agent {settings.agent}: {error.message}") from error
    if settings.as_json:
        print(json.dumps(rows))
    else:
        _print_table(settings.action, rows)


async def _stats(stub: Any, settings: ControlSettings) -> list[dict[str, Any]]:
    reply = await stub.GetTiers(kvtransfer_pb2.GetTiersRequest(), timeout=_ANSWER_SECONDS)
    if settings.tier and settings.tier not in [state.tier for state in reply.tiers]:
        raise InvalidRequest(
            f"this agent has no tier {settings.tier!r}: it has {', '.join(state.tier for state in reply.tiers)}"
        )
    return [
        {
            "tier": state.tier,
            "place": state.place,
            "blocks": state.num_blocks,
            "bytes": state.num_bytes,
            "max_bytes": state.max_bytes,
            "in_use": state.num_in_use,
            "hits": state.num_hits,
            "stored": state.num_stored,
            "evicted": state.num_evicted,
            "damaged": state.num_damaged,
            "dropped": dict(state.num_dropped),
            "trouble": state.trouble,
        }
        for state in reply.tiers
        if settings.tier in ("", state.tier)
    ]


async def _ls(stub: Any, settings: ControlSettings) -> list[dict[str, Any]]:
    request = kvtransfer_pb2.ListBlocksRequest(tier=settings.tier, limit=settings.limit)
    rows = []
    async for part in stub.ListBlocks(request, timeout=_CLEAR_SECONDS):
        for block in part.blocks:
            state = "written" if block.granted else "pinned" if block.num_pins else ""
            rows.append({"tier": part.tier, "bytes": block.num_bytes, "in_use": state, "name": block.name.hex()})
    return rows


async def _clear(stub: Any, settings: ControlSettings) -> list[dict[str, Any]]:
    request = kvtransfer_pb2.ClearBlocksRequest(tier=settings.tier)
    reply = await stub.ClearBlocks(request, timeout=_CLEAR_SECONDS)
    return [{"tier": tier.tier, "cleared": tier.num_blocks, "kept": tier.num_kept} for tier in reply.tiers]


_ROWS = {"stats": _stats, "ls": _ls, "clear": _clear}


def _print_table(action: str, rows: Sequence[dict[str, Any]]) -> None:
    if action == "ls":  # plain: names go into pipes
        for row in rows:
            print(f"{row['tier']:<6} {row['bytes']:>10} {row['in_use'] or '-':<8} {row['name']}")
        return
    if action == "clear":
        for row in rows:
            kept = f", {row['kept']} in use stay" if row["kept"] else ""
            print(f"{row['tier']}: {row['cleared']} blocks forgotten{kept}")
        return
    table = Table(box=None)
    for heading in ("tier", "blocks", "size", "bound", "in use", "hits", "stored", "evicted", "damaged", "dropped"):
        table.add_column(heading, justify="left" if heading == "tier" else "right")
    for row in rows:
        in_use = str(row["in_use"]) if row["tier"] == ARENA else "-"
        counts = [str(row[name]) for name in ("hits", "stored", "evicted", "damaged")]
        sizes = [_short(row["bytes"]), _short(row["max_bytes"])]
        table.add_row(row["tier"], str(row["blocks"]), *sizes, in_use, *counts, str(sum(row["dropped"].values())))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    for row in rows:
        if row["trouble"]:
            print(f"{row['tier']} is stopped: {row['trouble']}")


def _short(num_bytes: int) -> str:
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if num_bytes >= (size := parse_size(f"1{unit}")):
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} B"


if __name__ == "__main__":
    main()
