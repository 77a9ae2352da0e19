"""Settings of the decode worker."""

from __future__ import annotations

from pydantic import Field

from services.worker.config import WorkerSettings


class DecodeSettings(WorkerSettings, cli_prog_name="relevo-decode"):
    """Continuous batching: streams tokens until the end of each request."""

    port: int = Field(50053, ge=0, le=65535, description="gRPC port; 0: any that is free")
