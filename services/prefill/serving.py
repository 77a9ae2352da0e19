"""Putting a prefill worker together."""

from __future__ import annotations

from services.common.lifecycle import Process
from services.pb import worker_pb2
from services.prefill.config import PrefillSettings
from services.prefill.servicer import prefill_registration
from services.worker.process import serve_worker


async def serve_prefill(settings: PrefillSettings, process: Process) -> None:
    await serve_worker(settings, process, worker_pb2.ROLE_PREFILL, prefill_registration)
