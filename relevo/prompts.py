"""What parameters of a request need a tokenizer for: truncating prompts, and words that are not to be said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from relevo.core.errors import InvalidRequest
from relevo.core.sampling_params import SamplingParams
from relevo.tokenizer import Tokenizer


def truncate_prompt(
    token_ids: list[int], sampling: SamplingParams, max_model_len: int, tokenizer: Tokenizer | None
) -> list[int]:
    """What truncate_prompt_tokens leaves: the last tokens, and special ones (BOS) that the prompt begins with.

    Raises InvalidRequest if more are to be left than the model takes.
    """
    wanted = sampling.truncate_prompt_tokens
    if wanted is None:
        return token_ids
    if wanted == -1:
        wanted = max(1, max_model_len - (sampling.max_tokens or 1))
    elif wanted > max_model_len:
        raise InvalidRequest(
            f"truncate_prompt_tokens is {wanted}, but the model's context is {max_model_len} tokens",
            "truncate_prompt_tokens",
        )
    if len(token_ids) <= wanted:
        return token_ids
    kept = _added_in_front(token_ids, tokenizer)[: wanted - 1]
    return [*kept, *token_ids[len(token_ids) - wanted + len(kept) :]]


def resolve_bad_words(sampling: SamplingParams, tokenizer: Tokenizer | None) -> SamplingParams:
    """bad_words_token_ids of bad_words: as vLLM, each without and with a space before it.

    Raises InvalidRequest if there is no tokenizer to make them with.
    """
    if not sampling.bad_words:
        return sampling
    if tokenizer is None:
        raise InvalidRequest("this model has no tokenizer: bad_words can't be found in its output", "bad_words")
    sequences: dict[tuple[int, ...], None] = dict.fromkeys(sampling.bad_words_token_ids)
    for word in sampling.bad_words:
        for text in (word.lstrip(), f" {word.lstrip()}"):
            sequences[tuple(tokenizer.encode(text, add_special_tokens=False))] = None
    return replace(sampling, bad_words=(), bad_words_token_ids=tuple(ids for ids in sequences if ids))


def _added_in_front(token_ids: Sequence[int], tokenizer: Tokenizer | None) -> list[int]:
    """The special tokens with which the tokenizer begins a text, as far as the prompt begins with them."""
    if tokenizer is None:
        return []
    added = []
    for ours, given in zip(tokenizer.encode(""), token_ids, strict=False):
        if ours != given or not tokenizer.is_special(ours):
            break
        added.append(ours)
    return added
