"""relevo kv …: what a KV transfer agent holds.

The agent's contract belongs to `services`, which nothing here imports: a process of theirs asks it, and prints.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated, Literal

import typer

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Show and clear what a KV transfer agent holds, tier by tier."
)

Tier = Literal["arena", "disk", "redis"]
Agent = Annotated[
    str,
    typer.Option(
        envvar="RELEVO_KV_AGENT",
        metavar="HOST:PORT",
        help="the agent's gRPC address; `relevo serve` prints it. Its token, if it has one, is read from"
        " RELEVO_KV_TOKEN, certificates from RELEVO_TLS_CERT, RELEVO_TLS_KEY and RELEVO_TLS_CA",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]

_DEFAULT_AGENT = "127.0.0.1:50051"


@app.callback()
def root() -> None:
    """Show and clear what a KV transfer agent holds, tier by tier."""


@app.command()
def ls(
    *,
    agent: Agent = _DEFAULT_AGENT,
    tier: Annotated[Tier | None, typer.Option(help="this tier alone")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000_000, help="blocks listed of each tier")] = 100,
    json: AsJson = False,
) -> None:
    """Names of the blocks, those in use and the most recently used first."""
    _ask("ls", agent, tier, json, f"--limit={limit}")


@app.command()
def stats(
    *,
    agent: Agent = _DEFAULT_AGENT,
    tier: Annotated[Tier | None, typer.Option(help="this tier alone")] = None,
    json: AsJson = False,
) -> None:
    """What each tier holds and has done since the agent's start."""
    _ask("stats", agent, tier, json)


@app.command()
def clear(
    *,
    agent: Agent = _DEFAULT_AGENT,
    tier: Annotated[Tier | None, typer.Option(help="this tier alone; Redis: of all agents that share it")] = None,
    json: AsJson = False,
) -> None:
    """Forget the blocks of a tier, or of all. Those that somebody writes or reads at this moment stay."""
    _ask("clear", agent, tier, json)


def _ask(action: str, agent: str, tier: Tier | None, json: bool, *more: str) -> None:
    command = [sys.executable, "-m", "services.kvtransfer.control", f"--action={action}", f"--agent={agent}", *more]
    command += [f"--tier={tier}"] if tier is not None else []
    command += ["--as-json"] if json else []
    returncode = subprocess.run(command, check=False).returncode
    if returncode:
        raise typer.Exit(returncode if returncode > 0 else 1)
