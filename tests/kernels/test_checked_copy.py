"""The copy that computes xxh3-64 on its way, against the xxhash package and plain copies."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from relevo.kernels.checked_copy import check, copy_checked
from relevo.kernels.xxh3 import MIN_BYTES


def copied(num_bytes: int, target_offset: int, source_offset: int, seed: int) -> tuple[bytes, bytes, bytes, int]:
    """Source; copy; what lies around the copy; checksum."""
    random = np.random.default_rng(seed)
    source = random.integers(0, 256, num_bytes + source_offset, np.uint8)[source_offset:]
    target = np.full(num_bytes + 256, 0xA5, np.uint8)
    start = -target.ctypes.data % 64 + target_offset
    (checksum,) = copy_checked([target.ctypes.data + start], [source.ctypes.data], num_bytes)
    around = bytes(target[:start]) + bytes(target[start + num_bytes :])
    return bytes(source), bytes(target[start : start + num_bytes]), around, checksum


def test_check_accepts_this_machine() -> None:
    assert check()


def test_it_is_compiled_also_where_nothing_can_be_kept_on_disk() -> None:
    """As in a container whose user has no home and may not write to the installation."""
    code = "from relevo.kernels.checked_copy import check; assert check()"
    nowhere = {**os.environ, "NUMBA_CACHE_LOCATOR_CLASSES": "ZipCacheLocator"}  # nothing here lies in an archive
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=nowhere)
    assert result.returncode == 0, result.stderr
    assert "set NUMBA_CACHE_DIR to a writable directory" in result.stderr


@given(
    num_bytes=st.integers(MIN_BYTES, 10 * MIN_BYTES),
    target_offset=st.sampled_from([0, 0, 1, 8, 32]),
    source_offset=st.integers(0, 70),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=300)
def test_copy_is_whole_and_its_checksum_is_xxh3(
    num_bytes: int, target_offset: int, source_offset: int, seed: int
) -> None:
    source, copy, around, checksum = copied(num_bytes, target_offset, source_offset, seed)
    assert copy == source
    assert set(around) == {0xA5}, "it wrote beside the target"
    assert checksum == xxhash.xxh3_64_intdigest(source)


@pytest.mark.parametrize("num_bytes", [196_608, 2 << 20, 1024 * 17, 1024 * 17 + 1, 1024 * 17 + 63, 1024 * 17 + 64])
def test_sizes_of_blocks_and_edges(num_bytes: int) -> None:
    source, copy, _, checksum = copied(num_bytes, 0, 0, num_bytes)
    assert copy == source
    assert checksum == xxhash.xxh3_64_intdigest(source)


@pytest.mark.parametrize("num_bytes", [1 << 20, (1 << 20) + 9])
def test_checksum_is_of_what_was_stored_whatever_happens_to_the_source(num_bytes: int) -> None:
    """A writer changes the source all the while: each checksum still fits its copy."""
    source, target = np.zeros(num_bytes, np.uint8), np.zeros(num_bytes, np.uint8)
    is_over = threading.Event()

    def change() -> None:
        value = 0
        while not is_over.is_set():
            value = (value + 1) % 256
            source[:] = value

    writer = threading.Thread(target=change)
    writer.start()
    try:
        end = time.monotonic() + 10
        for _ in range(200):
            (checksum,) = copy_checked([target.ctypes.data], [source.ctypes.data], num_bytes)
            assert checksum == xxhash.xxh3_64_intdigest(target.data)
            if time.monotonic() > end:
                break
    finally:
        is_over.set()
        writer.join()


def test_lists_of_different_lengths_are_a_bug() -> None:
    with pytest.raises(AssertionError):
        copy_checked([1, 2], [1], MIN_BYTES)
