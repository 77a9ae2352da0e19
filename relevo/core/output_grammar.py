"""What the engine's core sees of a grammar that a request's output must fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from relevo.core.errors import RelevoError


class OutputGrammar(Protocol):
    """One request's grammar, with a matcher inside that follows the output and goes back where it has to.

    is_ready: it is compiled, or cannot be (then there is an error): until then the request cannot be stepped
    error: why the request must fail; None as long as nothing has gone wrong
    """

    @property
    def is_ready(self) -> bool: ...

    @property
    def error(self) -> RelevoError | None: ...

    def wait(self, seconds: float) -> None:
        """Until it is ready, but not longer."""

    def fill_mask(self, output_token_ids: Sequence[int], address: int, num_bytes: int) -> None:
        """Write which tokens may follow this output: bit i % 32 of int32 i // 32 for token i.

        A function of the grammar and the output alone, whatever output it was asked about before. Behind a token that
        the grammar does not allow (a draft that will be rejected) only the end of text may follow.
        One thread at a time.
        """
