"""The tiers that the settings ask for."""

from __future__ import annotations

import asyncio

from relevo.core.errors import StartupError
from services.kvtransfer.config import KvTransferSettings
from services.kvtransfer.held import HeldNames
from services.kvtransfer.tiers import Tier
from services.kvtransfer.tiers.disk import DiskTier


async def open_tiers(settings: KvTransferSettings, held: HeldNames) -> list[Tier]:
    """Fastest first; to be closed. Raises StartupError."""
    tiers: list[Tier] = []
    if settings.kv_disk is not None:
        tiers.append(
            await asyncio.to_thread(
                DiskTier,
                settings.kv_disk,
                settings.kv_disk_bytes,
                settings.tier_retry_seconds,
                held.add,
                held.discard,
            )
        )
    if settings.kv_redis is not None:
        try:
            from services.kvtransfer.tiers.redis_tier import RedisTier  # an extra: not everybody has it
        except ImportError as error:
            raise StartupError("--kv-redis needs the package redis: pip install 'relevo[redis]'") from error
        tiers.append(
            RedisTier(
                settings.kv_redis.get_secret_value(),
                settings.kv_redis_bytes,
                settings.kv_redis_ttl_seconds,
                settings.tier_retry_seconds,
            )
        )
    return tiers
