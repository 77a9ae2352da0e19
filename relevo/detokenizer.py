"""Tokens to text as they come: whole characters only, and never the beginning of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from relevo.tokenizer import Tokenizer


class Detokenizer:
    """The text of one choice. All that push() and finish() return, joined, is how the output continues the prompt.

    stop: the text ends before the stop string that is complete first (of several that end together: the longest)
    include_stop: the stop string is part of the text
    min_tokens: stop strings that end within so many tokens are text like any other
    tokenizer: None writes the ids in decimal, separated by spaces
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt_token_ids: Sequence[int],
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._min_tokens = min_tokens
        self._include_stop = include_stop
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._has_text = tokenizer is not None and self._begin_after(tokenizer, prompt_token_ids)
        self._matchers = [_Matcher(stop_string) for stop_string in stop]
        self._held = ""
        self.num_tokens_used = 0
        self.stop_string: str | None = None

    @property
    def stopped(self) -> bool:
        """A stop string was found: its last token is number `num_tokens_used`, and nothing more will come."""
        return self.stop_string is not None

    def push(self, token_ids: Sequence[int]) -> str:
        """New text that may be shown. Tokens after the end of a stop string are ignored."""
        shown = []
        for token_id in token_ids:
            if self.stopped:
                break
            self.num_tokens_used += 1
            shown.append(self._show(self._utf8.decode(self._bytes(token_id))))
        return "".join(shown)

    def finish(self) -> str:
        """What was held back; a character that stayed incomplete is U+FFFD."""
        if self.stopped:
            return ""
        incomplete = self._utf8.getstate()[0]
        each_byte = self._tokenizer is not None and self._tokenizer.replaces_each_byte
        self._utf8.reset()
        shown = self._show("\ufffd" * (len(incomplete) if each_byte else bool(incomplete)))
        if not self.stopped:
            shown, self._held = shown + self._held, ""
        return shown

    def _begin_after(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int]) -> bool:
        """Whether there is text before the output; a character that the prompt left incomplete is completed by it."""
        texts = []
        for token_id in reversed(prompt_token_ids):
            if not self._is_skipped(tokenizer, token_id) and (text := tokenizer.token_bytes(token_id)):
                texts.append(text)
                if sum(map(len, texts)) >= 4:  # the longest character
                    break
        self._utf8.decode(b"".join(reversed(texts)))
        return bool(texts)

    def _bytes(self, token_id: int) -> bytes:
        if self._tokenizer is None:
            return f"{token_id}".encode() if self.num_tokens_used == 1 else f" {token_id}".encode()
        if self._is_skipped(self._tokenizer, token_id):
            return b""
        if self._has_text:
            return self._tokenizer.token_bytes(token_id)
        text = self._tokenizer.first_token_bytes(token_id)
        self._has_text = bool(self._tokenizer.token_bytes(token_id))
        return text

    def _is_skipped(self, tokenizer: Tokenizer, token_id: int) -> bool:
        return self._skip_special_tokens and tokenizer.is_special(token_id)

    def _show(self, text: str) -> str:
        """Text that no stop string can reach back into any more; what it may is held."""
        if not self._matchers:
            return text
        for index, character in enumerate(text):
            complete = [matcher.stop for matcher in self._matchers if matcher.feed(character)]
            if complete and self.num_tokens_used > self._min_tokens:
                self.stop_string = max(complete, key=len)
                known = self._held + text[: index + 1]
                self._held = ""
                return known if self._include_stop else known[: len(known) - len(self.stop_string)]
        known = self._held + text
        num_held = max(matcher.num_matched for matcher in self._matchers)
        shown, self._held = known[: len(known) - num_held], known[len(known) - num_held :]
        return shown


class _Matcher:
    """Looks for one string, a character at a time (Knuth, Morris, Pratt 1977, "Fast pattern matching in strings").

    num_matched: length of the longest beginning of `stop` that the text so far ends with, short of the whole
    """

    def __init__(self, stop: str) -> None:
        assert stop, "SamplingParams lets no empty stop string through"
        self.stop = stop
        self.num_matched = 0
        # _shorter[n]: the longest proper beginning of stop[:n] that stop[:n] also ends with
        self._shorter = [0] * (len(stop) + 1)
        length = 0
        for n in range(2, len(stop) + 1):
            length = self._extend(length, stop[n - 1])
            self._shorter[n] = length

    def feed(self, character: str) -> bool:
        """Whether the text now ends with the whole string."""
        self.num_matched = self._extend(self.num_matched, character)
        if self.num_matched < len(self.stop):
            return False
        self.num_matched = self._shorter[self.num_matched]
        return True

    def _extend(self, length: int, character: str) -> int:
        while length and self.stop[length] != character:
            length = self._shorter[length]
        return length + 1 if self.stop[length] == character else 0
