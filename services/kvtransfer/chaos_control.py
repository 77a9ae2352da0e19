"""python -m services.kvtransfer.chaos_control: makes an agent fail that has --faults. `relevo chaos` runs it."""

from __future__ import annotations

import asyncio
import sys
from typing import Literal

from pydantic import Field

from relevo.core.errors import Mismatch, RelevoError, Unavailable
from services.common.config import parse_settings
from services.common.errors import relevo_errors
from services.common.grpc import make_channel
from services.common.security import PeerSettings, read_security
from services.pb import chaos_pb2, chaos_pb2_grpc

_ANSWER_SECONDS = 5.0


class ChaosSettings(PeerSettings, cli_prog_name="relevo-chaos"):
    """Make a KV transfer agent fail that was started with --faults."""

    action: Literal["set", "corrupt"] = Field(description="what to do")
    agent: str = Field(description="the agent's address")
    delay_ms: float | None = Field(None, description="how long a delay takes")
    delay_probability: float | None = Field(None, description="of each operation")
    drop_probability: float | None = Field(None, description="of each operation")
    cut_probability: float | None = Field(None, description="of each operation")
    faults_seed: int | None = Field(None, ge=0, description="of what is random there")
    blocks: int = Field(1, ge=1, description="how many to damage")


def main() -> None:
    """A failure is one line on stderr, and exit code 1."""
    try:
        print(asyncio.run(ask(parse_settings(ChaosSettings))))
    except RelevoError as error:
        print(f"relevo: error: {' '.join(error.message.split())}", file=sys.stderr)
        sys.exit(1)


async def ask(settings: ChaosSettings) -> str:
    """Do it; returns a line that says what holds now. Raises RelevoError."""
    async with make_channel(settings.agent, read_security(settings)) as channel:
        stub = chaos_pb2_grpc.ChaosStub(channel)
        try:
            with relevo_errors(f"kvtransfer agent {settings.agent}"):
                if settings.action == "corrupt":
                    request = chaos_pb2.CorruptBlocksRequest(num_blocks=settings.blocks)
                    reply = await stub.CorruptBlocks(request, timeout=_ANSWER_SECONDS)
                    return f"a bit flipped in {reply.num_blocks} sealed blocks"
                change = chaos_pb2.SetFaultsRequest(
                    delay_ms=settings.delay_ms,
                    delay_probability=settings.delay_probability,
                    drop_probability=settings.drop_probability,
                    cut_probability=settings.cut_probability,
                    seed=settings.faults_seed,
                )
                return describe(await stub.SetFaults(change, timeout=_ANSWER_SECONDS))
        except Unavailable as error:
            raise Unavailable(f"no KV agent answers at {settings.agent}: {error.message}") from error
        except Mismatch as error:
            raise Mismatch(f"the KV agent at {settings.agent} was started without --faults") from error


def describe(faults: chaos_pb2.Faults) -> str:
    return (
        f"each operation: delayed by {faults.delay_ms:g} ms with probability {faults.delay_probability:g},"
        f" dropped with {faults.drop_probability:g}, its stream cut with {faults.cut_probability:g};"
        f" so far, of {faults.num_operations}: {faults.num_delayed} delayed, {faults.num_dropped} dropped,"
        f" {faults.num_cut} cut; {faults.num_corrupted} blocks damaged"
    )


if __name__ == "__main__":
    main()
