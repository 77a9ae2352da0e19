"""The discovery that the settings ask for."""

from __future__ import annotations

from contextlib import AsyncExitStack

from services.common.discovery import Discovery, StaticDiscovery
from services.common.discovery.dns import DnsDiscovery
from services.common.discovery.settings import open_fleet_redis
from services.router.config import RouterSettings


def make_discovery(settings: RouterSettings, stack: AsyncExitStack) -> Discovery:
    """stack: closes what it keeps open. Raises StartupError."""
    names = {"prefill": settings.prefill, "decode": settings.decode}
    if settings.discovery == "static":
        return StaticDiscovery(names)
    if settings.discovery == "dns":
        return DnsDiscovery(names, settings.dns_seconds)
    redis = open_fleet_redis(settings)
    stack.push_async_callback(redis.close)
    from services.common.discovery.redis_discovery import RedisDiscovery  # as in open_fleet_redis

    return RedisDiscovery(redis, settings.discovery_ttl_seconds)
