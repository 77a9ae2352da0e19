"""What strikes a process from within, at a moment that is chosen exactly. For processes that the zygote forks."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Moment = Literal["before", "computing", "copying", "sealed"]
Blow = Literal["SIGKILL", "SIGSTOP", "hang"]

CHUNK_TOKENS = 24  # so that 90 tokens are four chunks
BLOCK_TOKENS = 16


@dataclass(frozen=True)
class Fault:
    """moment: before the chunk's step; when it is computed, and nobody knows; half of its first block is copied; all of
    its blocks are sealed. chunk: 1 for the first. blow: hang keeps the thread that it strikes, for ever.
    """

    moment: Moment
    chunk: int
    blow: Blow = "SIGKILL"

    @property
    def first_block(self) -> int:
        """Of the chunk's."""
        return (self.chunk - 1) * CHUNK_TOKENS // BLOCK_TOKENS

    @property
    def num_sealed_blocks(self) -> int:
        """With this chunk, if it is not the last."""
        return self.chunk * CHUNK_TOKENS // BLOCK_TOKENS


def install(fault: Fault) -> None:
    """In a prefill worker that serves one request."""
    {"before": _before, "computing": _computing, "copying": _copying, "sealed": _sealed}[fault.moment](fault)


def _strike(fault: Fault) -> None:
    if fault.blow == "hang":
        threading.Event().wait()
    # To this thread: one sent to the process may reach another first, and this one would go on for a moment.
    signal.pthread_kill(threading.get_ident(), getattr(signal, fault.blow))


def _before(fault: Fault) -> None:
    _patch_step(lambda engine, done: done == fault.chunk - 1 and bool(engine.scheduler._requests), None, fault)


def _computing(fault: Fault) -> None:
    _patch_step(None, lambda done: done == fault.chunk, fault)


def _patch_step(before: Callable[[Any, int], bool] | None, after: Callable[[int], bool] | None, fault: Fault) -> None:
    """From when the engine's thread starts: what an engine steps before that is to try itself out."""
    from relevo.engine.engine_thread import EngineThread

    start = EngineThread.start

    def start_striking(thread: EngineThread) -> None:
        engine: Any = thread.engine
        step = engine.step
        num_done = 0

        def striking_step() -> Any:
            nonlocal num_done
            if before is not None and before(engine, num_done):
                _strike(fault)
            result = step()
            num_done += result.num_scheduled_tokens > 0
            if after is not None and result.num_scheduled_tokens > 0 and after(num_done):
                _strike(fault)
            return result

        engine.step = striking_step
        start(thread)

    setattr(EngineThread, "start", start_striking)  # noqa: B010  # for mypy, which knows it as a method


def _copying(fault: Fault) -> None:
    """Half of the block is in its slot; one that was only stopped copies the other half, and seals, when it goes on."""
    from services.kvtransfer import mapping

    copy = mapping._copy
    num_copied = 0

    def striking_copy(targets: list[Any], sources: list[Any], private: list[Any]) -> list[int]:
        nonlocal num_copied
        if num_copied <= fault.first_block < num_copied + len(targets):
            target, source = (arrays[fault.first_block - num_copied] for arrays in (targets, sources))
            half = len(target) // 2
            target[:half] = source[:half]
            _strike(fault)
        num_copied += len(targets)
        return copy(targets, sources, private)

    mapping._copy = striking_copy


def _sealed(fault: Fault) -> None:
    from services.kvtransfer.publication import Publication

    seal = Publication.seal

    async def striking_seal(publication: Publication, *args: Any) -> None:
        await seal(publication, *args)
        if len(publication.sealed) >= fault.num_sealed_blocks:
            _strike(fault)

    setattr(Publication, "seal", striking_seal)  # noqa: B010  # for mypy, as above
