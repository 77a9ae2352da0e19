"""How workers are found: what a worker and a router of one fleet are both told."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, SecretStr

from relevo.core.errors import StartupError
from services.common.security import PeerSettings
from services.common.stuck import STUCK_SECONDS

if TYPE_CHECKING:
    from services.common.discovery.fleet_redis import FleetRedis


class FleetSettings(PeerSettings):
    """Settings of a worker or a router."""

    redis_url: SecretStr | None = Field(
        None,
        description="for --discovery redis, and for API keys' limits over several routers: redis://HOST:PORT/0, rediss://"
        " (TLS) or unix://; with a password in it better not as a flag: flags show in `ps`",
    )
    fleet_name: str = Field(
        "default", min_length=1, max_length=200, description="several fleets may share a Redis: each has its name"
    )
    discovery_ttl_seconds: float = Field(
        10.0,
        gt=0.1,
        le=3600,
        description="of --discovery redis: for how long a worker is found that says nothing more",
    )
    stuck_seconds: float = Field(
        STUCK_SECONDS,
        gt=0,
        le=86400,
        description="an engine that is in one step for so long, and for four times as long as in any before, is stuck:"
        " routers pass such a worker over, and its gRPC health says NOT_SERVING",
    )


def open_fleet_redis(settings: FleetSettings) -> FleetRedis:
    """Raises StartupError without --redis-url, or where the package redis is missing."""
    if settings.redis_url is None:
        raise StartupError("--discovery redis needs --redis-url (or RELEVO_REDIS_URL): redis://HOST:PORT/0")
    try:
        from services.common.discovery.fleet_redis import FleetRedis  # an extra: not everybody has it
    except ImportError as error:
        raise StartupError("--discovery redis needs the package redis: pip install 'relevo[redis]'") from error
    return FleetRedis(settings.redis_url.get_secret_value(), settings.fleet_name)
