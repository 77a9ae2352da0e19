"""A service for test_lifecycle: `python -m tests.common.service [--crash] …`."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from contextlib import AsyncExitStack

from pydantic import Field

from relevo.core.errors import StartupError
from services.common.config import ServiceSettings
from services.common.grpc import make_server
from services.common.lifecycle import Process, run_service

logger = logging.getLogger(__name__)


class ExampleSettings(ServiceSettings, cli_prog_name="relevo-example"):
    """A service that does what a test wants."""

    act: str = Field("", description="crash | refuse | slow-start | stuck-thread")


async def serve(settings: ExampleSettings, process: Process) -> None:
    stack: AsyncExitStack = process.stack
    stack.callback(logger.info, "first in, last out")
    server = make_server([], settings.host, settings.port)
    await server.start()
    stack.push_async_callback(server.stop, settings.drain_seconds)
    stack.callback(logger.info, "last in, first out")
    if settings.act == "crash":
        process.spawn(crash(), "crasher")
    elif settings.act == "refuse":
        raise StartupError("this will\nnot do")
    elif settings.act == "slow-start":
        print("starting", flush=True)
        await asyncio.sleep(60)
    elif settings.act == "stuck-thread":
        process.spawn(asyncio.to_thread(threading.Event().wait), "stuck")  # type: ignore[arg-type]
    process.ready(address=server.address, id="example-0")


async def crash() -> None:
    await asyncio.sleep(0.05)
    raise KeyError("gone")


if __name__ == "__main__":
    sys.exit(run_service("example", ExampleSettings, serve))
