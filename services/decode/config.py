"""Settings of the decode worker."""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from relevo.engine.config import EngineConfig
from services.worker.config import WorkerSettings


class DecodeSettings(WorkerSettings, cli_prog_name="relevo-decode"):
    """Continuous batching: streams tokens until the end of each request."""

    speculative: str | None = Field(
        None, description="who drafts tokens ahead: draft:PATH, draft:demo, ngram or suffix; by default nobody"
    )
    num_speculative_tokens: int | None = Field(
        None, ge=1, le=32, description="drafts a step and request, at most; by default 5, of ngram and suffix 10"
    )
    adaptive_speculation: bool = Field(True, description="draft only where it is measured to pay")
    port: int = Field(50053, ge=0, le=65535, description="gRPC port; 0: any that is free")

    def engine_config(self) -> EngineConfig:
        return replace(
            super().engine_config(),
            speculative=self.speculative,
            num_speculative_tokens=self.num_speculative_tokens,
            adaptive_speculation=self.adaptive_speculation,
        )
