"""All substrings of a text that grows, in one step a token (Blumer et al. 1985), and how often they go on how."""

from __future__ import annotations

from collections.abc import Sequence

COUNTED_SUFFIXES = 16  # of each prefix, the longest first: whose occurrences are counted. Bounds the work for a token
MIN_SHARE = 0.3  # of the cases where a text went on, those that went on so; below it a guess ends

ROOT = 0


class SuffixAutomaton:
    """A state stands for the substrings that end at the same places; length: of the longest of them."""

    def __init__(self) -> None:
        self._next: list[dict[int, int]] = [{}]
        self._link = [-1]
        self._length = [0]
        self._count = [0]
        self._last = ROOT
        self.num_tokens = 0

    def extend(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            self._append(token_id)
        self.num_tokens += len(token_ids)

    def repeated_suffix(self) -> tuple[int, int]:
        """The longest suffix of the text that stood in it before: its state and length."""
        state = self._link[self._last] if self._last != ROOT else ROOT
        return state, self._length[state]

    def advance(self, state: int, length: int, token_id: int) -> tuple[int, int]:
        """The longest suffix of another text that is in this one, after one more token of that."""
        while length and length <= self._length[self._link[state]]:  # the state was split meanwhile
            state = self._link[state]
        while token_id not in self._next[state]:
            if state == ROOT:
                return ROOT, 0
            state = self._link[state]
            length = self._length[state]
        return self._next[state][token_id], length + 1

    def continuation(self, state: int, num_tokens: int) -> list[int]:
        """How what the state stands for went on most often, as long as that is not a mere guess."""
        drafts: list[int] = []
        share = 1.0
        while len(drafts) < num_tokens and (following := self._next[state]):
            total = best_count = 0
            best = -1
            for token_id, target in following.items():
                count = self._count[target]
                total += count
                if count >= best_count:  # of equals the newest
                    best, best_count = token_id, count
            share *= best_count / total if total else 0.0
            if best < 0 or share < MIN_SHARE:
                break
            drafts.append(best)
            state = following[best]
        return drafts

    def _append(self, token_id: int) -> None:
        following, link, length, count = self._next, self._link, self._length, self._count
        new = len(following)
        following.append({})
        length.append(length[self._last] + 1)
        link.append(ROOT)
        count.append(0)
        state = self._last
        while state != -1 and token_id not in following[state]:
            following[state][token_id] = new
            state = link[state]
        if state != -1:
            target = following[state][token_id]
            if length[target] != length[state] + 1:
                target = self._split(state, token_id, target)
            link[new] = target
        self._last = state = new
        for _ in range(COUNTED_SUFFIXES):
            if state <= ROOT:
                break
            count[state] += 1
            state = link[state]

    def _split(self, state: int, token_id: int, target: int) -> int:
        """Substrings up to length[state] + 1 get a state of their own: they end at more places than longer ones."""
        following, link = self._next, self._link
        clone = len(following)
        following.append(dict(following[target]))
        self._length.append(self._length[state] + 1)
        link.append(link[target])
        self._count.append(self._count[target])
        link[target] = clone
        while state != -1 and following[state].get(token_id) == target:
            following[state][token_id] = clone
            state = link[state]
        return clone
