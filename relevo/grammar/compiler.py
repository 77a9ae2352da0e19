"""Grammars, compiled in threads of their own and kept: nobody waits who did not ask."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from relevo.core.errors import Exhausted, InvalidRequest
from relevo.core.structured_outputs import COMPILE_SECONDS, Source, StructuredOutputs
from relevo.grammar.source import llguidance_source
from relevo.tokenizer import Tokenizer

if TYPE_CHECKING:  # imported with the first grammar: an engine that has none runs without llguidance
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MAX_CACHED = 128  # a megabyte each at the very most
NUM_THREADS = 4  # some that compile for seconds keep nobody else waiting
NICENESS = 10  # of theirs: a tenth of a core beside threads that compute or answer

_MAX_MESSAGE = 400


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """template: at the beginning of a text; copied for each request, never moved on itself"""

    template: LLMatcher
    vocabulary: Vocabulary


@dataclass(frozen=True, slots=True)
class Vocabulary:
    tokenizer: LLTokenizer
    eos_token_ids: tuple[int, ...]


class GrammarCompiler:
    """Compiles each description once; what failed is remembered too.

    load_tokenizer: called with the first grammar, in a thread; None if the model has no tokenizer
    vocab_size: of the model's logits; None takes the tokenizer's
    eos_token_ids: what ends a text
    compile_seconds: CPU time that one may take
    max_pending: how many may wait to be compiled; None where requests are bounded otherwise
    checks_only: nobody computes masks with what it compiles: the vocabulary without what makes them quick takes a third

    Any thread.
    """

    def __init__(
        self,
        load_tokenizer: Callable[[], Tokenizer | None],
        eos_token_ids: Sequence[int],
        *,
        vocab_size: int | None = None,
        compile_seconds: float = COMPILE_SECONDS,
        max_pending: int | None = None,
        checks_only: bool = False,
    ) -> None:
        self._load_tokenizer = load_tokenizer
        self._eos_token_ids = tuple(eos_token_ids)
        self._vocab_size = vocab_size
        self._compile_seconds = compile_seconds
        self._max_pending = max_pending
        self._slices: list[str] | None = [] if checks_only else None
        self._lock = threading.Lock()  # of the cache
        self._cache: OrderedDict[Source, Future[CompiledGrammar]] = OrderedDict()
        self._num_pending = 0
        self._vocabulary: Vocabulary | None = None
        self._loading = threading.Lock()
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar", initializer=_give_way)

    def compile(self, outputs: StructuredOutputs) -> Future[CompiledGrammar]:
        """Ends with InvalidRequest if nothing fits it, or nobody can compile it. Raises Exhausted."""
        with self._lock:
            known = self._cache.get(outputs.source)
            if known is not None:
                self._cache.move_to_end(outputs.source)
                return known
            if self._max_pending is not None and self._num_pending >= self._max_pending:
                raise Exhausted(f"{self._num_pending} grammars are waiting to be compiled", 1.0)
            self._num_pending += 1
            future = self._cache[outputs.source] = self._threads.submit(self._compile, outputs)
            while len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)
        future.add_done_callback(self._done)
        return future

    def prepare(self) -> None:
        """Read the vocabulary now: for a large one the interpreter stands still for a third of a second, which at
        start-up nobody notices. A model without what it takes says so to whoever asks for a grammar.
        """
        with contextlib.suppress(InvalidRequest):
            self._load_vocabulary()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _done(self, future: Future[CompiledGrammar]) -> None:
        with self._lock:
            self._num_pending -= 1

    def _compile(self, outputs: StructuredOutputs) -> CompiledGrammar:
        from llguidance import LLMatcher

        vocabulary = self._load_vocabulary()
        started = time.thread_time()
        try:
            matcher = LLMatcher(vocabulary.tokenizer, llguidance_source(outputs), limits=_limits(), log_level=0)
        except ValueError as error:  # also text that is no Unicode
            raise _invalid(str(error)) from error
        if not matcher.is_error():
            # A first mask tells whether any text fits; and its lexer's states are there for all copies.
            matcher.compute_bitmask()
        if matcher.is_error():
            raise _invalid(_reason(matcher.get_error()))
        seconds = time.thread_time() - started
        if seconds > self._compile_seconds:
            raise _invalid(f"too large: compiling takes {seconds:.1f} s, more than {self._compile_seconds:g} s")
        return CompiledGrammar(matcher, vocabulary)

    def _load_vocabulary(self) -> Vocabulary:
        with self._loading:
            if self._vocabulary is None:
                tokenizer = self._load_tokenizer()
                if tokenizer is None:
                    raise _invalid("this model has no tokenizer, so that text is unknown to it")
                self._vocabulary = make_vocabulary(
                    tokenizer, self._vocab_size, self._eos_token_ids, slices=self._slices
                )
            return self._vocabulary


def make_vocabulary(
    tokenizer: Tokenizer,
    vocab_size: int | None,
    eos_token_ids: Sequence[int],
    *,
    slices: list[str] | None = None,
) -> Vocabulary:
    """slices: llguidance's, parts of the vocabulary by which masks are quick; None: its own choice.

    Raises InvalidRequest if the model has no token that ends a text.
    """
    from llguidance import LLTokenizer

    size = tokenizer.vocab_size if vocab_size is None else vocab_size
    ends = tuple(token_id for token_id in eos_token_ids if token_id < size)
    if not ends:
        raise _invalid("this model has no end-of-text token, so that no text could end")
    words = _Words(tokenizer, size, ends[0])
    its_tokenizer = LLTokenizer(cast(str, words), n_vocab=size, eos_token=list(ends), slices=slices)
    words.tokens.clear()  # they have been read, but `words` itself is kept
    return Vocabulary(its_tokenizer, ends)


def _give_way() -> None:
    """Let this thread compute when others don't. Only Linux has priorities of single threads."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def _limits() -> LLParserLimits:
    """What bounds compiling, and each mask after it (its fuel: some 15 ms of the lexer, 3 ms of the parser)."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_grammar_size=200_000, max_lexer_states=20_000, initial_lexer_fuel=1_000_000, verbose_errors=False
    )


class _Words:
    """A tokenizer as LLTokenizer reads it. Special tokens have no bytes, so that no text holds any."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: tuple[int, ...] = ()

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        self.eos_token_id = eos_token_id
        self.tokens = [b"" if tokenizer.is_special(i) else tokenizer.token_bytes(i) for i in range(vocab_size)]

    def __call__(self, text: str) -> list[int]:
        raise AssertionError("nothing is forced, so that nothing is tokenized")


def _reason(message: str) -> str:
    """llguidance's words, without its state."""
    if message.startswith("NoExtension"):
        return "no text fits it"
    first = message.split("\n<state>")[0].strip()
    return first if len(first) <= _MAX_MESSAGE else f"{first[:_MAX_MESSAGE]}…"


def _invalid(reason: str) -> InvalidRequest:
    return InvalidRequest(f"the output's grammar cannot be used: {reason}", "structured_outputs")
