"""Settings of the prefill worker."""

from __future__ import annotations

from pydantic import Field

from services.worker.config import WorkerSettings


class PrefillSettings(WorkerSettings, cli_prog_name="relevo-prefill"):
    """Turns prompts into KV blocks, hands them over, and samples the first token."""

    port: int = Field(50052, ge=0, le=65535, description="gRPC port; 0: any that is free")
