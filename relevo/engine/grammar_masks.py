"""Masks of the tokens that grammars allow, made on a thread of their own while the model runs."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from relevo.core.output_grammar import OutputGrammar

if TYPE_CHECKING:
    from relevo.engine.logits_processing import SamplingRow

_WORD = 32


@dataclass(frozen=True, slots=True)
class Masks:
    """In host memory. rows: [m] int64, which rows of the logits; words: [m, ceil(vocab / 32)] int32. See
    Kernels.mask_logits.
    """

    rows: npt.NDArray[np.int64]
    words: npt.NDArray[np.int32]


class GrammarMasks:
    """One thread: the masks of a step are ready before its logits are, unless a grammar is uncommonly hard."""

    def __init__(self, vocab_size: int) -> None:
        self._num_words = -(-vocab_size // _WORD)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")

    def begin(self, rows: Sequence[SamplingRow]) -> Future[Masks] | None:
        """Start on the rows that have a grammar; None if there are none."""
        constrained = [
            (i, row.grammar, row.token_ids[row.num_prompt_tokens :])
            for i, row in enumerate(rows)
            if row.grammar is not None
        ]
        return self._thread.submit(self._fill, constrained) if constrained else None

    def _fill(self, constrained: Sequence[tuple[int, OutputGrammar, Sequence[int]]]) -> Masks:
        words: npt.NDArray[np.int32] = np.empty((len(constrained), self._num_words), dtype=np.int32)
        for row, (_, grammar, output_token_ids) in enumerate(constrained):
            line = words[row]
            grammar.fill_mask(output_token_ids, line.ctypes.data, line.nbytes)
        return Masks(np.array([i for i, _, _ in constrained], dtype=np.int64), words)
