"""Text to token ids some ten times faster than `tokenizers`, where that is proved to give the same ids.

gigatoken reads a tokenizer.json and splits and merges by its own code. It is another program, so it is taken only for a
tokenizer for which the two agree on a list of texts made to catch differences: characters of all kinds, white space,
contractions, the tokenizer's own added tokens in every surrounding. Everything else is encoded as before.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers

logger = logging.getLogger(__name__)

Encode = Callable[[str], list[int]]

NUM_RANDOM_TEXTS = 300
_MAX_ADDED_TOKENS = 64  # of the tokenizer's, in the texts; some have thousands, all alike

_WORDS = (
    "it's I'LL we'Ve the Größe naïve \ufb01ne \u017ftra\u00dfe \u0130stanbul 1234567 3.14 v2.0 \u00bd \u00b2 "
    "日本語のテキスト 한국어 العربية हिन्दी ไทย Ελλάδα"
)
_SYMBOLS = (
    " \t\n\r\v\f\u00a0\u2003\u3000\u200b\u2028\u0085\ufeff\u200d\u0301.,;:!?'\"`\u00b4()[]{}<>/\\|@#$%^&*_-+=~"
    "\u20ac\u2122\u2026\u2014\U0001f600\U0001f469\u200d\U0001f467\U0001f1e9\U0001f1ea\ufffd"
)
_TEXTS = (
    "",
    " ",
    "  leading and trailing  ",
    "two\n\nlines\r\nthree\n \n",
    "tabs\tand\t\tmore",
    "a" * 300,
    "0" * 50,
    " " * 100,
    "\n" * 20,
    "def f(x):\n    return {'a': x[0], \"b\": -1.5e-3}  # done\n",
    "https://example.org/a_b?c=d&e=%20#f",
    "\u00e9 e\u0301 \u00c5 \u212b \uff46\uff55\uff4c\uff4c \ufdfa",
    "\x00\x01\x7f\x80",
    _WORDS,
    _SYMBOLS,
)


def fast_encode(backend: tokenizers.Tokenizer) -> Encode | None:
    """A function that gives the ids that `backend` gives without adding special tokens; None where there is none.

    Costs some 50 ms, and what gigatoken_encode costs.
    """
    encode = gigatoken_encode(backend.to_str())
    if encode is None:
        return None
    for text in _texts(backend):
        if encode(text) != backend.encode_batch_fast([text], add_special_tokens=False)[0].ids:
            logger.info("gigatoken and tokenizers differ at %r: the latter encodes", text)
            return None
    return encode


def gigatoken_encode(tokenizer_json: str) -> Encode | None:
    """gigatoken's ids, which nobody has compared yet; None if it does not take the tokenizer, or is not there.

    Costs 20 MB for its tables. The function may be called from several threads, and takes no lone surrogates.
    """
    try:
        from gigatoken import BytesSource, Tokenizer  # an optional dependency: not every platform has a wheel
    except ImportError:
        return None
    try:
        inner = Tokenizer.from_json(tokenizer_json).backend  # what is around it keeps the JSON
    except Exception as error:  # whatever it does not support
        logger.debug("gigatoken does not take this tokenizer: %s", error)
        return None

    def encode(text: str) -> list[int]:
        if not text:
            return []
        # Bytes in, lists out: strings or arrays would make it import awkward and numpy, for 40 MB.
        ids: list[int] = inner.encode_batch_list(BytesSource(text.encode()), parallel=False)[0]
        return ids

    return encode


def _texts(backend: tokenizers.Tokenizer) -> Iterator[str]:
    """Always the same ones for a tokenizer."""
    yield from _TEXTS
    added = [token.content for _, token in sorted(backend.get_added_tokens_decoder().items())][:_MAX_ADDED_TOKENS]
    for token in added:
        yield from (token, f"a{token}b", f" {token} ", f"\n{token}\n\n", token * 2, token[:-1], f"x {token[1:]}")
    numbers = random.Random(0)
    pools = [list(_SYMBOLS), _WORDS.split(), [*_SYMBOLS, *_WORDS.split(), *added], [chr(i) for i in range(32, 127)]]
    for _ in range(NUM_RANDOM_TEXTS):
        pool = [*numbers.choice(pools), *(_character(numbers) for _ in range(8))]
        yield "".join(numbers.choice(pool) + numbers.choice(("", "", " ")) for _ in range(numbers.randrange(1, 30)))


def _character(numbers: random.Random) -> str:
    """Any at all, but for surrogates."""
    code = numbers.randrange(0x110000 - 0x800)
    return chr(code if code < 0xD800 else code + 0x800)
