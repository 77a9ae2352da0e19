"""A prompt's logprobs: computed once, for the first of its choices, and shown with each of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from services.pb import messages_pb2
from services.router.http.logprobs import TokenNames, finite

PromptEntries = Sequence[messages_pb2.TokenLogprobs]  # one for each token of the prompt but the first
ShownLogprobs = list[dict[str, dict[str, object]] | None]


class SharedPromptLogprobs:
    """What a prompt's first choice tells the others. If it fails, the whole answer does, and nobody waits any more."""

    def __init__(self) -> None:
        self._entries: asyncio.Future[PromptEntries] = asyncio.get_running_loop().create_future()

    def tell(self, entries: PromptEntries) -> None:
        if not self._entries.done():
            self._entries.set_result(entries)

    async def wait(self) -> PromptEntries:
        return await asyncio.shield(self._entries)


def cut_top(entries: PromptEntries, count: int) -> PromptEntries:
    """With the likeliest `count` only: there are more where another parameter asks for more."""
    if all(len(entry.top) <= count for entry in entries):
        return entries
    return [messages_pb2.TokenLogprobs(chosen=entry.chosen, top=entry.top[:count]) for entry in entries]


def show_prompt_logprobs(names: TokenNames, entries: PromptEntries, count: int) -> ShownLogprobs:
    """vLLM's shape: for each token the likeliest `count` and itself, by id; for the first there is nothing."""
    shown: ShownLogprobs = [None]
    for entry in entries:
        by_id: dict[str, dict[str, object]] = {}
        for one in (*entry.top[:count], entry.chosen):
            by_id.setdefault(
                str(one.token_id),
                {"logprob": finite(one.logprob), "rank": one.rank, "decoded_token": names.text(one.token_id)},
            )
        shown.append(by_id)
    return shown
