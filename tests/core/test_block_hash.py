from __future__ import annotations

import hashlib
import struct
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relevo.core.block_hash import LayerShape, hash_blocks, layout_fingerprint, root_hash

TOKEN_IDS = st.lists(st.integers(0, 2**32 - 1), max_size=70)


@given(TOKEN_IDS, st.integers(1, 20))
def test_chain_is_sha256_of_parent_and_little_endian_tokens(token_ids: list[int], block_size: int) -> None:
    parent = hashlib.sha256(b"any parent").digest()
    expected = []
    previous = parent
    for index in range(len(token_ids) // block_size):
        block = token_ids[index * block_size : (index + 1) * block_size]
        previous = hashlib.sha256(previous + struct.pack(f"<{block_size}I", *block)).digest()
        expected.append(previous)
    assert hash_blocks(parent, token_ids, block_size) == expected


@given(TOKEN_IDS, st.integers(1, 8), st.integers(0, 8))
def test_continued_chain_equals_the_whole(token_ids: list[int], block_size: int, cut: int) -> None:
    whole = hash_blocks(bytes(32), token_ids, block_size)
    head = hash_blocks(bytes(32), token_ids, block_size, 0, cut * block_size) if cut <= len(whole) else whole
    parent = head[-1] if head else bytes(32)
    assert head + hash_blocks(parent, token_ids, block_size, len(head) * block_size) == whole


def test_names_do_not_depend_on_the_process() -> None:
    """Two interpreters with different hash seeds agree, and with a value worked out elsewhere."""
    code = (
        "from relevo.core.block_hash import *;"
        "f = layout_fingerprint('m', 'r', '', 'float32', 4, [LayerShape(2, 16, 16)]);"
        "print(hash_blocks(root_hash(f, cache_salt='s'), [1, 2, 3, 4, 5], 4)[0].hex())"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in ("1", "2")
    }

    def sized(part: bytes) -> bytes:
        return struct.pack("<I", len(part)) + part

    fingerprint = hashlib.sha256(b"".join(map(sized, (b"m", b"r", b"", b"float32", b"4", b"2,16,16")))).digest()
    root = hashlib.sha256(fingerprint + sized(b"") + sized(b"s")).digest()
    assert runs == {hashlib.sha256(root + struct.pack("<4I", 1, 2, 3, 4)).hexdigest()}


def test_everything_that_determines_the_bytes_changes_the_name() -> None:
    layers = [LayerShape(2, 16, 16)]
    fingerprints = {
        layout_fingerprint("m", "r", "", "float32", 16, layers),
        layout_fingerprint("M", "r", "", "float32", 16, layers),
        layout_fingerprint("m", "R", "", "float32", 16, layers),
        layout_fingerprint("m", "r", "int8", "float32", 16, layers),
        layout_fingerprint("m", "r", "", "bfloat16", 16, layers),
        layout_fingerprint("m", "r", "", "float32", 32, layers),
        layout_fingerprint("m", "r", "", "float32", 16, [LayerShape(4, 16, 16)]),
        layout_fingerprint("m", "r", "", "float32", 16, layers * 2),
        layout_fingerprint("mr", "", "", "float32", 16, layers),
    }
    assert len(fingerprints) == 9
    fingerprint = fingerprints.pop()
    assert len({root_hash(fingerprint), root_hash(fingerprint, "a"), root_hash(fingerprint, "", "a")}) == 3


def test_token_id_beyond_u32_is_an_error() -> None:
    with pytest.raises(OverflowError):
        hash_blocks(bytes(32), [2**32], 1)
