"""The random number behind each token: a function of (seed, position), so that a row's token is the same alone, in any
batch, after any preemption and in any process. What it is used for: `relevo.kernels.sampling`.
"""

from __future__ import annotations

_MASK64 = 2**64 - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) for the token at `position` of a sequence: 53 bits of a hash of (seed, position).

    SplitMix64 at a place that itself is a SplitMix64 hash of the seed (Steele, Lea & Flood 2014, "Fast splittable
    pseudorandom number generators"; the mixing function is Stafford's variant 13). Plain integers: the same everywhere.
    """
    state = _mix64(seed + _GOLDEN_GAMMA) + (position + 1) * _GOLDEN_GAMMA
    return (_mix64(state) >> 11) * 2.0**-53


def _mix64(z: int) -> int:
    z &= _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)
