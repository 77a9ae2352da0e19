"""xxh3-64 by kernels, against the xxhash package."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xxhash

from relevo.kernels.triton import checksum
from relevo.kernels.xxh3 import finish
from tests.kernels.compiling import compile_launches


def random_blocks(num_blocks: int, num_bytes: int) -> torch.Tensor:
    return torch.randint(0, 256, (num_blocks, num_bytes), dtype=torch.uint8)


def hashes(storage: torch.Tensor, block_ids: list[int]) -> list[int]:
    lanes = checksum.hash_lanes(storage, torch.tensor(block_ids, dtype=torch.int64))
    return [finish(each, storage.shape[1]) for each in lanes.tolist()]


# a piece is 1024 bytes, a stripe 64; what is one more than a program's, and than what is loaded ahead
@pytest.mark.parametrize("num_bytes", [1024, 1032, 1088, 1096, 2040, 2048, 2056, 8192, 9216, 9224, 17 * 1024 + 72])
def test_triton_hashes_are_xxh3(num_bytes: int) -> None:
    storage, ids = random_blocks(4, num_bytes), [2, 0, 3]
    assert hashes(storage, ids) == [xxhash.xxh3_64_intdigest(storage[i].numpy().data) for i in ids]


@pytest.mark.parametrize("byte", [0, 255])
def test_triton_hashes_of_extreme_bytes(byte: int) -> None:
    storage = torch.full((1, 3000), byte, dtype=torch.uint8)
    assert hashes(storage, [0]) == [xxhash.xxh3_64_intdigest(bytes([byte]) * 3000)]


def test_triton_hashes_of_no_blocks() -> None:
    assert hashes(random_blocks(2, 2048), []) == []


def test_each_byte_counts_with_triton() -> None:
    """One bit of each word of a block is another."""
    storage = torch.zeros(1 + 1096 // 8, 1096, dtype=torch.uint8)
    for row in range(1, len(storage)):
        storage[row, 8 * (row - 1) + row % 8] = 1 << row % 7
    assert len(set(hashes(storage, list(range(len(storage)))))) == len(storage)


def test_what_is_known_is_what_xxhash_computes() -> None:
    for num_bytes, known in checksum._KNOWN.items():
        pattern = np.arange(num_bytes // 8, dtype=np.uint64) * np.uint64(0x9E3779B185EBCA87)
        assert known == xxhash.xxh3_64_intdigest(pattern.data)


def test_triton_checks_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checksum.check(torch.device("cpu"))
    monkeypatch.setattr(checksum, "finish", lambda lanes, num_bytes: finish(lanes, num_bytes) ^ 1)
    assert not checksum.check(torch.device("cpu"))


@pytest.mark.parametrize(("block_bytes", "can"), [(1016, False), (1024, True), (1028, False), (2 << 20, True)])
def test_blocks_of_whole_words_and_a_piece_can_be_hashed(block_bytes: int, can: bool) -> None:
    assert checksum.can_hash(block_bytes) is can


def launches() -> None:
    for num_bytes in (2 << 20, 2056):
        checksum.hash_lanes(torch.zeros(4, num_bytes, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))


def test_triton_kernels_of_checksums_compile() -> None:
    kernels = compile_launches(f"{__name__}:launches")
    assert {kernel.name for kernel in kernels} == {"sum_stripes_kernel", "scramble_kernel"}
    assert all(kernel.fits for kernel in kernels), [kernel for kernel in kernels if not kernel.fits]
