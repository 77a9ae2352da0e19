"""Putting a decode worker together."""

from __future__ import annotations

from services.common.lifecycle import Process
from services.decode.config import DecodeSettings
from services.decode.servicer import decode_registration
from services.pb import worker_pb2
from services.worker.process import serve_worker


async def serve_decode(settings: DecodeSettings, process: Process) -> None:
    await serve_worker(settings, process, worker_pb2.ROLE_DECODE, decode_registration)
