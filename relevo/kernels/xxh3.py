"""What implementations of xxh3-64 share: its constants, and the end of its computation.

https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md, inputs of more than 240 bytes, seed 0: eight lanes of 64
bits take up stripes of 64 bytes, and are scrambled after each piece of 16 stripes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MIN_BYTES = 1024  # of what is hashed here; at 240 and below, the algorithm is another one
STRIPE_BYTES = 64
STRIPES = 16  # between two scramblings
PIECE_BYTES = STRIPE_BYTES * STRIPES

# fmt: off
SECRET = np.frombuffer(bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221b8084674f743248e"
    "e03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8a8fa763fe39c343ff9dcbbc7c70b4f1d"
    "8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc"
    "8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
), np.uint8)
# fmt: on
SECRET_BYTES = 192
SCRAMBLING_SECRET = SECRET_BYTES - STRIPE_BYTES  # where it begins in SECRET; a stripe's begins at 8 × its number
LAST_SECRET = SECRET_BYTES - STRIPE_BYTES - 7  # of the last 64 bytes
FINAL_SECRET = 11

P32_1, P32_2, P32_3 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
P64_1, P64_2, P64_3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
P64_4, P64_5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
START = np.array([P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1], np.uint64)
AVALANCHE = 0x165667919E3779F9

_MASK = (1 << 64) - 1
_FINAL = [int(word) for word in SECRET[FINAL_SECRET : FINAL_SECRET + STRIPE_BYTES].view(np.uint64)]


def finish(lanes: Sequence[int], num_bytes: int) -> int:
    """The hash, from the eight lanes (signed or not) after the last stripe."""
    words = [(lane & _MASK) ^ secret for lane, secret in zip(lanes, _FINAL, strict=True)]
    result = num_bytes * P64_1
    for left, right in zip(words[::2], words[1::2], strict=True):
        product = left * right
        result += (product & _MASK) ^ (product >> 64)
    result &= _MASK
    result ^= result >> 37
    result = result * AVALANCHE & _MASK
    return result ^ (result >> 32)
