"""python -m services.common.health ADDRESS: exit code 0 if what listens there can serve; else 1, and a line says why.

For containers' health checks: a container of ours has neither grpcurl nor curl.
"""

from __future__ import annotations

import asyncio
import sys
import urllib.error
import urllib.request

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import Field
from pydantic_settings import CliPositionalArg

from relevo.core.errors import InvalidRequest, RelevoError, Unavailable
from services.common.config import parse_settings
from services.common.grpc import make_channel
from services.common.security import PeerSettings, read_security


class HealthSettings(PeerSettings, cli_prog_name="relevo-health"):
    """Ask a service whether it can serve: by the gRPC health protocol, or a router by its HTTP endpoint.

    Example: python -m services.common.health 127.0.0.1:50053
    Example: python -m services.common.health http://127.0.0.1:8000/health
    """

    address: CliPositionalArg[str] = Field(description="host:port, or the URL of a router's /health")
    timeout_seconds: float = Field(3.0, gt=0, le=3600, description="how long it may take to answer")


def main() -> None:
    try:
        settings = parse_settings(HealthSettings)
        check(settings)
    except RelevoError as error:
        print(f"relevo-health: {error.message}", file=sys.stderr)
        sys.exit(1)
    print("SERVING")


def check(settings: HealthSettings) -> None:
    """Returns if it serves. Raises Unavailable saying why not, InvalidRequest for what is no address."""
    if settings.address.startswith(("http://", "https://")):
        _check_http(settings)
    else:
        asyncio.run(_check_grpc(settings))


async def _check_grpc(settings: HealthSettings) -> None:
    host, _, port = settings.address.rpartition(":")
    if not host or not port.isdigit():
        raise InvalidRequest(f"{settings.address!r} is no address: host:port is, such as 127.0.0.1:50053")
    async with make_channel(settings.address, read_security(settings)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            reply = await stub.Check(health_pb2.HealthCheckRequest(), timeout=settings.timeout_seconds)
        except grpc.aio.AioRpcError as error:
            reason = " ".join(str(error.details()).split())
            raise Unavailable(f"{settings.address} does not answer: {reason}") from error
    if reply.status != health_pb2.HealthCheckResponse.SERVING:
        raise Unavailable(f"{settings.address}: {health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)}")


def _check_http(settings: HealthSettings) -> None:
    try:
        # No other scheme gets here; no proxy: what is asked is this host's, or a neighbour's.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(settings.address, timeout=settings.timeout_seconds):
            return
    except urllib.error.HTTPError as error:
        raise Unavailable(f"{settings.address}: {error.code}: {error.read(500).decode(errors='replace')}") from error
    except OSError as error:
        raise Unavailable(f"{settings.address} does not answer: {error}") from error


if __name__ == "__main__":
    main()
