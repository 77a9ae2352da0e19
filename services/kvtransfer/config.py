"""Settings of the KV transfer agent."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from services.common.config import ByteSize, ServiceSettings


class KvTransferSettings(ServiceSettings, cli_prog_name="relevo-kvtransfer"):
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
