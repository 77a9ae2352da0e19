"""python -m services.decode"""

from __future__ import annotations

import gc

from relevo.allocator import use_one_heap
from services.common.lifecycle import Process, run_service
from services.common.nixl import leave
from services.decode.config import DecodeSettings


async def serve(settings: DecodeSettings, process: Process) -> None:
    use_one_heap()  # before torch's import has made threads
    gc.disable()  # until loaded: what is imported now stays, and looking through it again and again takes a second
    # Here, because it imports torch: --help and wrong flags are answered without waiting for that.
    from services.decode.serving import serve_decode

    await serve_decode(settings, process)


def main() -> None:
    leave(run_service("decode", DecodeSettings, serve))


if __name__ == "__main__":
    main()
