"""Log-probabilities in the two shapes of OpenAI's API."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from typing_extensions import TypedDict

from relevo.tokenizer import Tokenizer
from services.pb import messages_pb2

LEAST_LOGPROB = -9999.0  # what OpenAI writes for "impossible"; JSON has no infinity


class CompletionLogprobs(TypedDict):
    """/v1/completions: parallel lists. text_offset: characters of the text before the token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[ChatTokenLogprob]
    refusal: None


class TokenNames:
    """How tokens are shown. Without a tokenizer: their ids in decimal. as_ids: "token_id:7", unmistakably."""

    def __init__(self, tokenizer: Tokenizer | None, *, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def is_special(self, token_id: int) -> bool:
        return self._tokenizer is not None and self._tokenizer.is_special(token_id)

    def text(self, token_id: int) -> str:
        if self._as_ids:
            return f"token_id:{token_id}"
        return str(token_id) if self._tokenizer is None else self._tokenizer.token_text(token_id)

    def bytes(self, token_id: int) -> bytes:
        return str(token_id).encode() if self._tokenizer is None else self._tokenizer.token_bytes(token_id)


class TextOffsets:
    """Where each token of one choice begins in its text (characters). A character belongs to the token that ends it."""

    def __init__(self, names: TokenNames, skip_special_tokens: bool) -> None:
        self._names = names
        self._skip_special_tokens = skip_special_tokens
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def next(self, token_id: int) -> int:
        before = self._offset
        if not (self._skip_special_tokens and self._names.is_special(token_id)):
            self._offset += len(self._decoder.decode(self._names.bytes(token_id)))
        return before


def completion_logprobs(
    names: TokenNames,
    offsets: TextOffsets,
    entries: Sequence[messages_pb2.TokenLogprobs],
    echoed: tuple[int, Sequence[messages_pb2.TokenLogprobs]] | None = None,
) -> CompletionLogprobs:
    """top_logprobs has the chosen token always, so it may hold one more than was asked for.

    echoed: the prompt's first token, which has no logprob, and the entries of its others
    """
    if echoed is not None:
        token_id, prompt_entries = echoed
        offset = offsets.next(token_id)
        rest = completion_logprobs(names, offsets, [*prompt_entries, *entries])
        return {
            "tokens": [names.text(token_id), *rest["tokens"]],
            "token_logprobs": [None, *rest["token_logprobs"]],
            "top_logprobs": [None, *rest["top_logprobs"]],
            "text_offset": [offset, *rest["text_offset"]],
        }
    top_logprobs: list[dict[str, float] | None] = []
    for entry in entries:
        top: dict[str, float] = {}
        for one in (*entry.top, entry.chosen):
            top.setdefault(names.text(one.token_id), finite(one.logprob))
        top_logprobs.append(top)
    return {
        "tokens": [names.text(entry.chosen.token_id) for entry in entries],
        "token_logprobs": [finite(entry.chosen.logprob) for entry in entries],
        "top_logprobs": top_logprobs,
        "text_offset": [offsets.next(entry.chosen.token_id) for entry in entries],
    }


def chat_logprobs(names: TokenNames, entries: Iterable[messages_pb2.TokenLogprobs]) -> ChatLogprobs:
    content: list[ChatTokenLogprob] = []
    for entry in entries:
        chosen = _shown(names, entry.chosen)
        top = [_shown(names, one) for one in entry.top]
        content.append({**chosen, "top_logprobs": top})
    return {"content": content, "refusal": None}


def _shown(names: TokenNames, one: messages_pb2.Logprob) -> TopLogprob:
    return {
        "token": names.text(one.token_id),
        "logprob": finite(one.logprob),
        "bytes": list(names.bytes(one.token_id)),
    }


def finite(logprob: float) -> float:
    return logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB
