"""What one token of a text is in bytes, read from the decoder in tokenizer.json."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

ToBytes = Callable[[str], bytes]


def bytes_function(decoder: dict[str, Any]) -> ToBytes | None:
    """The bytes that a decoder of tokenizer.json makes of a token inside a text; None for a kind not known here.

    Known are byte-level BPE, and sentencepiece's: a mark for the space, bytes spelled <0x0A>, and a leading space that
    goes away at the start of a text, which does not concern a token inside.
    """
    steps = _steps(decoder)
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return from_byte_level
    marks: list[tuple[str, str]] = []
    has_byte_tokens = False
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(mark)}, "content": str(content)}:
                marks.append((mark, content))
            case {"type": "Metaspace", "replacement": str(mark)}:
                marks.append((mark, " "))
            case {"type": "ByteFallback"}:
                has_byte_tokens = True
            case {"type": "Fuse"} | {"type": "Strip", "stop": 0}:
                pass
            case _:
                return None
    if not marks:
        return None

    def from_marks(token: str) -> bytes:
        for mark, content in marks:
            token = token.replace(mark, content)
        if has_byte_tokens and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.encode()

    return from_marks


class TokenTable:
    """Every token's bytes by its id, in one piece: some 10 bytes a token, where a dictionary takes a hundred."""

    def __init__(self, joined: bytes, ends: array[int]) -> None:
        """ends: where each ends in `joined`, after a 0."""
        self.joined = joined
        self.ends = ends

    @classmethod
    def of(cls, tokens: Iterable[bytes]) -> TokenTable:
        known = list(tokens)
        return cls(b"".join(known), array("I", accumulate(map(len, known), initial=0)))

    def __getitem__(self, token_id: int) -> bytes:
        """b"" for an id that is no token."""
        if not 0 <= token_id < len(self.ends) - 1:
            return b""
        return self.joined[self.ends[token_id] : self.ends[token_id + 1]]


def decodes_bytes_apart(decoder: dict[str, Any]) -> bool:
    """Whether it makes a U+FFFD of each byte that is no UTF-8; others make one of an incomplete character."""
    return any(step["type"] == "ByteFallback" for step in _steps(decoder))


def from_byte_level(token: str) -> bytes:
    """Byte-level BPE's characters to the bytes they stand for.

    A character that stands for no byte makes the whole token text, as in tokenizers' decoder.
    """
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode()


def _steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = decoder.get("decoders", [decoder])
    return steps


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: printable bytes stand for themselves, the others, in order, for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()
