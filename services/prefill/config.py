"""Settings of the prefill worker."""

from __future__ import annotations

from services.worker.config import WorkerSettings


class PrefillSettings(WorkerSettings, cli_prog_name="relevo-prefill"):
    """Turns prompts into KV blocks, hands them over, and samples the first token."""

    port: int = 50052
