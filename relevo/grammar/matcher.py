"""One request's place in its grammar: a function of its output, computed incrementally."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from relevo.core.errors import InvalidRequest, RelevoError
from relevo.core.structured_outputs import StructuredOutputs
from relevo.grammar.compiler import CompiledGrammar, GrammarCompiler

if TYPE_CHECKING:
    from llguidance import LLMatcher


class GrammarMatcher:
    """See relevo.core.output_grammar. Follows the output as it grows, and back where drafted tokens were rejected.

    stop_token_ids: end a request as the end of text does; they may follow wherever that may
    """

    def __init__(self, compiled: Future[CompiledGrammar], stop_token_ids: Iterable[int]) -> None:
        self._compiled = compiled
        self._stop_token_ids = frozenset(stop_token_ids)
        self._matcher: LLMatcher | None = None
        self._token_ids: list[int] = []  # that the matcher has taken
        self._failed: RelevoError | None = None

    @property
    def is_ready(self) -> bool:
        return self._compiled.done()

    @property
    def error(self) -> RelevoError | None:
        if self._failed is None and self._compiled.done():
            error = self._compiled.exception()
            if error is not None:
                self._failed = error if isinstance(error, RelevoError) else RelevoError("internal error of the grammar")
        return self._failed

    def wait(self, seconds: float) -> None:
        done = threading.Event()
        self._compiled.add_done_callback(lambda _: done.set())
        done.wait(seconds)

    def fill_mask(self, output_token_ids: Sequence[int], address: int, num_bytes: int) -> None:
        compiled = self._compiled.result(timeout=0)
        if self._failed is not None or not self._walk(compiled, list(output_token_ids)):
            self._only(compiled.vocabulary.eos_token_ids, address, num_bytes)
            return
        assert self._matcher is not None
        self._matcher.unsafe_compute_mask_ptr(address, num_bytes)
        if self._matcher.is_error():
            self._failed = InvalidRequest(
                f"the output's grammar became too complex after {len(output_token_ids)} tokens "
                f"({self._matcher.stop_reason()})",
                "structured_outputs",
            )
        elif self._stop_token_ids and self._matcher.is_accepting():
            self._allow(self._stop_token_ids, address, num_bytes)

    def _walk(self, compiled: CompiledGrammar, token_ids: list[int]) -> bool:
        """Bring the matcher to where this output ends; False if the grammar does not allow it."""
        if self._matcher is None:
            self._matcher = compiled.template.deep_copy()
        known = self._token_ids
        common = len(known)
        if token_ids[:common] != known:
            pairs = enumerate(zip(known, token_ids, strict=False))
            common = next((i for i, (ours, theirs) in pairs if ours != theirs), min(len(known), len(token_ids)))
        if common < len(known) and not self._matcher.rollback(len(known) - common):
            self._matcher, common = compiled.template.deep_copy(), 0
        added = token_ids[common:]
        ends = compiled.vocabulary.eos_token_ids
        end = next((i for i, token_id in enumerate(added) if token_id in ends), len(added))
        num_taken = self._matcher.try_consume_tokens(added[:end]) if end else 0
        self._token_ids = token_ids[: common + num_taken]
        return num_taken == len(added)

    def _only(self, token_ids: Iterable[int], address: int, num_bytes: int) -> None:
        ctypes.memset(address, 0, num_bytes)
        self._allow(token_ids, address, num_bytes)

    def _allow(self, token_ids: Iterable[int], address: int, num_bytes: int) -> None:
        words = (ctypes.c_uint32 * (num_bytes // 4)).from_address(address)
        for token_id in token_ids:
            if token_id < 8 * num_bytes:
                words[token_id // 32] |= 1 << (token_id % 32)


def start_matching(
    compiler: GrammarCompiler, outputs: StructuredOutputs, stop_token_ids: Iterable[int]
) -> GrammarMatcher:
    """Compiling has begun when this returns. Raises Exhausted."""
    return GrammarMatcher(compiler.compile(outputs), stop_token_ids)
