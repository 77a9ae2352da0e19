"""Settings of the KV transfer agent."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr

from services.common.config import ByteSize, StringList
from services.common.security import PeerSettings


class KvTransferSettings(PeerSettings, cli_prog_name="relevo-kvtransfer"):
    """The KV transfer agent: one a host. Keeps sealed KV blocks in shared memory for the workers of its host, and
    fetches blocks from other hosts' agents.

    Example: python -m services.kvtransfer --port 50051 --kv-arena 4GiB
    """

    port: int = Field(50051, ge=0, le=65535, description="gRPC port; 0: any that is free")
    data_port: int = Field(
        0, ge=0, le=65535, description="TCP port from which other agents pull blocks; 0: any that is free"
    )
    advertise_host: str | None = Field(
        None, description="host under which workers and other agents reach this one; --host unless given"
    )
    kv_arena: ByteSize = Field(
        256 << 20, ge=4096, description="shared memory for blocks, allocated at the start, such as 256MiB or 4GiB"
    )
    arena_dir: Path = Field(
        Path("/dev/shm"),
        description="directory for the arena, in a tmpfs; the workers must see it under the same path",
    )
    pin_seconds: float = Field(
        60.0,
        gt=0,
        le=3600,
        description="how long a reader may keep blocks pinned after the last of them came, before it is cut off",
    )
    transports: StringList = Field(
        ["nixl", "tcp"],
        description="ways for blocks to come from other agents; those that are installed are probed, the quickest is"
        " taken",
    )
    link_floor: ByteSize = Field(
        100_000_000, ge=0, description="bytes a second; a link to another agent that is slower is logged as a warning"
    )
    data_tls: bool = Field(True, description="with --tls-cert: blocks are encrypted on their way, too")
    kv_disk: Path | None = Field(
        None, description="directory that keeps blocks beyond the arena, and over restarts; none unless given"
    )
    kv_disk_bytes: ByteSize = Field(10 << 30, ge=1 << 16, description="bound on what is kept there, such as 100GiB")
    kv_redis: SecretStr | None = Field(
        None, description="redis://HOST:PORT/0 (rediss: with TLS), which keeps blocks for all agents; none unless given"
    )
    kv_redis_bytes: ByteSize = Field(1 << 30, ge=1 << 16, description="bound on what this agent keeps there")
    kv_redis_ttl_seconds: int = Field(3600, ge=1, description="how long a block that nobody asks for is kept there")
    tier_retry_seconds: float = Field(
        30.0, gt=0, le=3600, description="how long a tier that has failed is left alone before it is tried again"
    )
    faults: bool = Field(False, description="for tests: `relevo chaos` may delay, drop and damage what goes on here")
