"""Which drafts are accepted: those that equal what plain decoding draws.

Every row's draw is a function of the row's tokens and (seed, position) alone. So the rows behind the drafts draw what
plain decoding would draw if the drafts were the text so far, and as long as they are, that is what it does draw. The
output is token for token that of plain decoding, for every sampling parameter. For a draft that is one certain token
this is the rejection sampling of Leviathan et al. (2023) and Chen et al. (2023): docs/adr/0016.
"""

from __future__ import annotations

from collections.abc import Sequence

from relevo.core.errors import RelevoError
from relevo.core.request import Request
from relevo.engine.logits_processing import SamplingRow
from relevo.engine.sampler import Sampled, SampledToken


def sampling_rows(
    request: Request, draft_token_ids: Sequence[int], eos_token_ids: tuple[int, ...]
) -> list[SamplingRow]:
    """One row behind the last known token, and one behind each draft: those see the drafts before them as text.

    What a row's choice depends on is a function of its token_ids. A grammar is shared by a request's rows: it follows
    the drafts, and goes back where they were rejected.
    """
    sampling, num_prompt_tokens, grammar = request.sampling, request.num_prompt_tokens, request.grammar
    rows = [SamplingRow(sampling, request.token_ids, num_prompt_tokens, eos_token_ids, grammar)]
    for end in range(1, len(draft_token_ids) + 1):
        token_ids = [*request.token_ids, *draft_token_ids[:end]]
        rows.append(SamplingRow(sampling, token_ids, num_prompt_tokens, eos_token_ids, grammar))
    return rows


def accept(draft_token_ids: Sequence[int], drawn: Sequence[Sampled]) -> list[SampledToken] | RelevoError:
    """The drafts that equal what was drawn in their place, and the one that was drawn behind them.

    drawn: one more than there are drafts. A row that has failed ends them: an error if it is the first; if it is behind
    accepted drafts, the next step finds that out again.
    """
    taken: list[SampledToken] = []
    for at, token in enumerate(drawn):
        if isinstance(token, RelevoError):
            return taken or token
        assert isinstance(token, SampledToken), "a beam search has no drafts, and is not to be asked"
        taken.append(token)
        if at == len(draft_token_ids) or draft_token_ids[at] != token.token_id:
            break
    return taken
