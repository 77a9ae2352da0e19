"""Where drafts come from, as the speculator sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from relevo.core.request import Request
from relevo.core.schedule import ScheduledRequest


class Proposer(Protocol):
    """Guesses the tokens behind requests' known ones. A wrong guess costs time and nothing else.

    What it keeps of a request goes with forget(). All calls come from the engine's thread.
    """

    def propose(self, entries: Sequence[ScheduledRequest]) -> list[list[int]]:
        """Drafts behind each request's known tokens: at most num_draft_slots, and as few as none.

        The requests' blocks have room for all slots. What a proposer must compute before it can guess (a prompt that it
        has not seen) it does here, a bounded part of it in each call.
        """
        ...

    def lag(self, request: Request) -> int:
        """Tokens that it would compute before it could guess, beyond those that every step brings."""
        ...

    def verified(self, entry: ScheduledRequest, num_accepted: int) -> None:
        """So many of the entry's drafts were right. Called before the request's tokens change."""
        ...

    def ended(self, request: Request) -> None:
        """The request has its whole answer: what can be learned from it is learned now."""
        ...

    def forget(self, request_id: str) -> None:
        """Harmless for a request that is not known."""
        ...
