"""python -m services.prefill"""

from __future__ import annotations

import gc

from relevo.allocator import use_one_heap
from relevo.core.errors import StartupError
from services.common.lifecycle import Process, run_service
from services.common.nixl import leave
from services.prefill.config import PrefillSettings


async def serve(settings: PrefillSettings, process: Process) -> None:
    if not settings.kv_agent:
        raise StartupError("--kv-agent (or RELEVO_KV_AGENT) is missing: a prefill worker hands its blocks over there")
    use_one_heap()  # before torch's import has made threads
    gc.disable()  # until loaded: what is imported now stays, and looking through it again and again takes a second
    # Here, because it imports torch: --help and wrong flags are answered without waiting for that.
    from services.prefill.serving import serve_prefill

    await serve_prefill(settings, process)


def main() -> None:
    leave(run_service("prefill", PrefillSettings, serve))


if __name__ == "__main__":
    main()
