"""What chunks of prompts add to a step, and how much of a prompt fits what a step may take for them."""

from __future__ import annotations

from collections.abc import Iterable

MAX_SMALLEST = 4  # tokens
WEIGHT = 0.03  # of the newest step in the means
ALONE_WEIGHT = 0.05  # of steps of prompts alone: large chunks are cheaper by the token than those beside others
MAX_RATIO = 3.0  # of what was expected and what is believed: a step is held up, or quick, for other reasons as well
MIN_GROWTH = 4  # tokens: chunks grow to twice what others were lately, and so many; costs of larger ones are guesses
LATELY = 0.9
NUM_ROUNDS = 3  # a measurement; the next goes on from there
MANY = 1 << 30  # tokens, where they cost nothing

Chunk = tuple[int, int]  # the position that it begins at, and its tokens
Features = tuple[float, float, float]


class PromptCosts:
    """Seconds that a chunk takes: of each token, of each pair of a token and a key before it, of each key that is read.

    Weighted least squares of relative errors, none of the three below 0. What steps show that others decode in goes
    first; steps of prompts alone say what those leave open.
    """

    def __init__(self, token: float = 0.0, pair: float = 0.0, key: float = 0.0) -> None:
        """As far as they are known; 0: not yet."""
        self._seconds = token, pair, key
        self._lately: float | None = None  # tokens in steps that others decoded in
        self._shared, self._alone = [0.0] * 9, [0.0] * 9  # means of products of features, and of those with seconds

    @property
    def is_known(self) -> bool:
        return any(self._seconds)

    def seconds(self, position: int, num_tokens: int) -> float:
        return _dot(self._seconds, _features([(position, num_tokens)]))

    def num_tokens(self, position: int, seconds: float) -> int:
        """How many tokens from this position on take so long, as far as that is known."""
        token, pair, key = self._seconds
        left = seconds - key * position
        if left <= 0.0:
            return 0
        slope, bend = token + pair * position + key, pair / 2  # slope * n + bend * n² = left
        divisor = slope + (slope * slope + 4 * bend * left) ** 0.5
        most = MANY if self._lately is None else int(2 * self._lately + MIN_GROWTH)
        return most if 2 * left >= most * divisor else int(2 * left / divisor)

    def smallest(self, position: int) -> int:
        """Tokens of a chunk where none fits: as many as take as long as reading the keys before them, or fewer."""
        token, pair, key = self._seconds
        each = token + pair * position
        wanted = key * position / each if each else 1.0
        return max(1, min(MAX_SMALLEST, round(wanted)))

    def add(self, chunks: Iterable[Chunk], seconds: float, *, alone: bool = False) -> None:
        """Account for what a step's chunks took: of it all, where it was of them alone; else beyond a plain step."""
        features = _features(chunks)
        expected = _dot(self._seconds, features)
        if expected:
            seconds = min(max(seconds, expected / MAX_RATIO), MAX_RATIO * expected)
        scale = max(seconds, expected)
        if scale <= 0.0:
            return
        if not alone:
            self._lately = max(features[0], LATELY * (self._lately or 0.0))
        sums = self._alone if alone else self._shared
        t, p, k, y = (value / scale for value in (*features, seconds))
        products = (t * t, t * p, t * k, p * p, p * k, k * k, t * y, p * y, k * y)
        sums[:] = [mean + WEIGHT * (product - mean) for mean, product in zip(sums, products, strict=True)]
        self._descend()

    def _descend(self) -> None:
        """Some rounds of coordinate descent."""
        tt, tp, tk, pp, pk, kk, ty, py, ky = (
            shared + ALONE_WEIGHT * alone for shared, alone in zip(self._shared, self._alone, strict=True)
        )
        token, pair, key = self._seconds
        for _ in range(NUM_ROUNDS):
            token = max(0.0, (ty - tp * pair - tk * key) / tt)
            pair = max(0.0, (py - tp * token - pk * key) / pp)
            key = max(0.0, (ky - tk * token - pk * pair) / kk)
        self._seconds = token, pair, key


def _features(chunks: Iterable[Chunk]) -> Features:
    tokens, pairs, keys = 0.0, 0.0, 0.0
    for position, num_tokens in chunks:
        tokens += num_tokens
        pairs += num_tokens * (position + num_tokens / 2)
        keys += position + num_tokens
    return tokens, pairs, keys


def _dot(seconds: Features, features: Features) -> float:
    return sum(a * b for a, b in zip(seconds, features, strict=True))
