"""Which drafts are accepted: those that equal what plain decoding draws.

Every row's draw is a function of the row's tokens and (seed, position) alone. So the rows behind the drafts draw what
plain decoding would draw if the drafts were the text so far, and as long as they are, that is what it does draw. The
output is token for token that of plain decoding, for every sampling parameter. For a draft that is one certain token
this is the rejection sampling of Leviathan et al. (2023) and Chen et al. (2023): docs/adr/0016.
"""

from __future__ import annotations

from collections.abc import Sequence

from relevo.core.request import Request
from relevo.engine.sampler import SampledToken, SamplingRow


def sampling_rows(
    request: Request, draft_token_ids: Sequence[int], eos_token_ids: tuple[int, ...]
) -> list[SamplingRow]:
    """One row behind the last known token, and one behind each draft: those see the drafts before them as text.

    Whatever a row's choice depends on beyond its token_ids (a grammar's state) is to be advanced here, draft by draft.
    A row behind a draft that the row before can't choose is never looked at, but must leave some token to choose.
    """
    rows = [SamplingRow(request.sampling, request.token_ids, request.num_prompt_tokens, eos_token_ids)]
    for end in range(1, len(draft_token_ids) + 1):
        token_ids = [*request.token_ids, *draft_token_ids[:end]]
        rows.append(SamplingRow(request.sampling, token_ids, request.num_prompt_tokens, eos_token_ids))
    return rows


def accept(draft_token_ids: Sequence[int], drawn: Sequence[SampledToken]) -> list[SampledToken]:
    """The drafts that equal what was drawn in their place, and the one that was drawn behind them.

    drawn: one more than there are drafts
    """
    num_accepted = 0
    for draft, token in zip(draft_token_ids, drawn, strict=False):
        if draft != token.token_id:
            break
        num_accepted += 1
    return list(drawn[: num_accepted + 1])
