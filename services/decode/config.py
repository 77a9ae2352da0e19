"""Settings of the decode worker."""

from __future__ import annotations

from services.worker.config import WorkerSettings


class DecodeSettings(WorkerSettings, cli_prog_name="relevo-decode"):
    """Continuous batching: streams tokens until the end of each request."""

    port: int = 50053
