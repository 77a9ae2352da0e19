"""Copying a KV block and computing its checksum in one pass: each byte is read once, hashed as it was read, and stored.

xxh3-64, and stores that go past the caches where the target allows it: neither side's other data is thrown out of them,
and no line is read only to be overwritten. Measured on 2 MiB blocks: 1.6 times as fast as a copy and a hash after
another.

Importing this needs numba, and no torch. The first call compiles, or reads the compiled code from disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numba
import numpy as np
import xxhash
from llvmlite import ir  # type: ignore[import-untyped]  # ships no types
from numba import types
from numba.core.datamodel.models import PrimitiveModel
from numba.extending import intrinsic, register_model

from relevo.kernels.disk_cache import kept_on_disk
from relevo.kernels.xxh3 import (
    AVALANCHE,
    FINAL_SECRET,
    LAST_SECRET,
    MIN_BYTES,
    P32_1,
    P64_1,
    PIECE_BYTES,
    SCRAMBLING_SECRET,
    SECRET,
    START,
    STRIPE_BYTES,
    STRIPES,
)

_TARGET_ALIGNMENT = 64  # of stores past the caches

_I64, _I128 = ir.IntType(64), ir.IntType(128)
_V = ir.VectorType(_I64, 8)


class _LanesType(types.Type):
    """Eight unsigned 64-bit integers in registers."""

    def __init__(self) -> None:
        super().__init__(name="uint64x8")


_lanes = _LanesType()


@register_model(_LanesType)
class _LanesModel(PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, _V)  # type: ignore[no-untyped-call]  # numba's


def _splat(value: int) -> Any:
    return ir.Constant(_V, [value] * 8)


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _V.as_pointer())


def _emitting(result: Any, *arguments: Any) -> Callable[[Callable[..., Any]], Any]:
    """A compiled function whose body is what the decorated one builds from (builder, *values)."""

    def decorate(emit: Callable[..., Any]) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            emitted = emit(builder, *values)
            return context.get_dummy_value() if result == types.void else emitted

        def of_one(typing_context: Any, a: Any) -> Any:
            return result(*arguments), generate

        def of_two(typing_context: Any, a: Any, b: Any) -> Any:
            return result(*arguments), generate

        def of_three(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
            return result(*arguments), generate

        return intrinsic((of_one, of_two, of_three)[len(arguments) - 1])

    return decorate


@_emitting(_lanes, types.int64)
def _load(builder: Any, address: Any) -> Any:
    loaded = builder.load(_pointer(builder, address))
    loaded.align = 1
    return loaded


@_emitting(types.void, types.int64, _lanes)
def _store(builder: Any, address: Any, value: Any) -> None:
    builder.store(value, _pointer(builder, address)).align = 1


@_emitting(types.void, types.int64, _lanes)
def _store_past_caches(builder: Any, address: Any, value: Any) -> None:
    stored = builder.store(value, _pointer(builder, address))
    stored.align = _TARGET_ALIGNMENT
    stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))


@_emitting(types.void, types.int64, types.int64)
def _copy_byte(builder: Any, target: Any, source: Any) -> None:
    pointer = ir.IntType(8).as_pointer()
    builder.store(builder.load(builder.inttoptr(source, pointer)), builder.inttoptr(target, pointer))


@_emitting(types.void, types.int64)
def _fence(builder: Any, _unused: Any) -> None:
    """Stores past the caches are seen by others only in this order."""
    builder.fence("seq_cst")


@_emitting(_lanes, _lanes, _lanes, _lanes)
def _accumulate(builder: Any, acc: Any, value: Any, secret: Any) -> Any:
    """acc[i ^ 1] += value[i]; acc[i] += low and high half of (value ^ secret)[i], multiplied."""
    key = builder.xor(value, secret)
    product = builder.mul(builder.and_(key, _splat(0xFFFFFFFF)), builder.lshr(key, _splat(32)))
    swapped = builder.shuffle_vector(
        value, value, ir.Constant(ir.VectorType(ir.IntType(32), 8), [1, 0, 3, 2, 5, 4, 7, 6])
    )
    return builder.add(builder.add(acc, swapped), product)


@_emitting(_lanes, _lanes, _lanes)
def _scramble(builder: Any, acc: Any, secret: Any) -> Any:
    mixed = builder.xor(builder.xor(acc, builder.lshr(acc, _splat(47))), secret)
    return builder.mul(mixed, _splat(P32_1))


@_emitting(types.uint64, types.uint64, types.uint64)
def _multiply_fold(builder: Any, a: Any, b: Any) -> Any:
    """The halves of a 128-bit product, xored."""
    product = builder.mul(builder.zext(a, _I128), builder.zext(b, _I128))
    return builder.xor(builder.trunc(product, _I64), builder.trunc(builder.lshr(product, ir.Constant(_I128, 64)), _I64))


@numba.njit(error_model="numpy")
def _finish(acc: Any, secret: Any, num_bytes: int) -> Any:
    """acc: [8] uint64. secret: the 64 bytes from its 11th on, as [8] uint64."""
    result = np.uint64(num_bytes) * np.uint64(P64_1)
    for index in range(0, 8, 2):
        result += _multiply_fold(acc[index] ^ secret[index], acc[index + 1] ^ secret[index + 1])
    result ^= result >> np.uint64(37)
    result *= np.uint64(AVALANCHE)
    return result ^ (result >> np.uint64(32))


def _build(store: Any) -> Callable[..., Any]:
    """The loop with one kind of stores. At acc_address are the lanes, and three stripes of room behind them."""

    @numba.njit(error_model="numpy")
    def copy(target: int, source: int, num_bytes: int, secret: int, acc_address: int) -> None:
        acc = _load(acc_address)
        num_blocks = (num_bytes - 1) // PIECE_BYTES
        last_secret = _load(secret + SCRAMBLING_SECRET)
        value = acc
        offset = 0
        for _ in range(num_blocks):
            for stripe in range(STRIPES):
                value = _load(source + offset)
                store(target + offset, value)
                acc = _accumulate(acc, value, _load(secret + 8 * stripe))
                offset += STRIPE_BYTES
            acc = _scramble(acc, last_secret)
        for stripe in range((num_bytes - 1 - offset) // STRIPE_BYTES):
            value = _load(source + offset)
            store(target + offset, value)
            acc = _accumulate(acc, value, _load(secret + 8 * stripe))
            offset += STRIPE_BYTES
        # The last 64 bytes may overlap the stripe before them, and others may write to source or target meanwhile:
        # what is new of them is read once, to where nobody else writes, and hashed, behind that stripe, and stored from
        # there.
        before, rest, read = acc_address + STRIPE_BYTES, acc_address + 2 * STRIPE_BYTES, acc_address + 3 * STRIPE_BYTES
        num_new = num_bytes - offset
        _store(before, value)
        _store(read, _load(source + num_bytes - STRIPE_BYTES))
        for index in range(num_new):
            _copy_byte(rest + index, read + STRIPE_BYTES - num_new + index)
            _copy_byte(target + offset + index, rest + index)
        value = _load(before + num_new)
        _fence(0)
        acc = _accumulate(acc, value, _load(secret + LAST_SECRET))
        _store(acc_address, acc)

    return cast("Callable[..., Any]", copy)


_copy_cached = _build(_store)
_copy_past_caches = _build(_store_past_caches)


def _copy_each(targets: Any, sources: Any, num_bytes: int, secret: Any, start: Any, checksums: Any) -> None:
    for index in range(len(targets)):
        acc = np.empty(4 * len(start), np.uint64)
        acc[:8] = start
        target, source = targets[index], sources[index]
        if target % _TARGET_ALIGNMENT:
            _copy_cached(target, source, num_bytes, secret.ctypes.data, acc.ctypes.data)
        else:
            _copy_past_caches(target, source, num_bytes, secret.ctypes.data, acc.ctypes.data)
        checksums[index] = _finish(acc, secret[FINAL_SECRET : FINAL_SECRET + STRIPE_BYTES].view(np.uint64), num_bytes)


_copy_checked = kept_on_disk(numba.njit, _copy_each, nogil=True, error_model="numpy")


def copy_checked(targets: Sequence[int], sources: Sequence[int], num_bytes: int) -> list[int]:
    """Copy blocks of num_bytes (at least MIN_BYTES) from address to address; the xxh3-64 of what was stored.

    Blocking; releases the GIL. The ranges must be mapped and must not overlap.

    Others may write meanwhile, and no checksum ever vouches for what it was not made of. To a target (a writer whose
    lease has ended): the checksum is the source's all the same. To a source (a slot that is no longer pinned): every
    byte that was stored has been hashed, so that a checksum that is right means that all of them are.
    """
    assert num_bytes >= MIN_BYTES and len(targets) == len(sources)
    checksums = np.empty(len(targets), np.uint64)
    _copy_checked(np.array(targets, np.int64), np.array(sources, np.int64), num_bytes, SECRET, START, checksums)
    found: list[int] = checksums.tolist()
    return found


def check() -> bool:
    """Compile, and see that it agrees with the xxhash package here."""
    for num_bytes in (MIN_BYTES, 3 * MIN_BYTES + 77):
        source = np.arange(num_bytes, dtype=np.uint32).view(np.uint8)[:num_bytes].copy()
        target = np.zeros(num_bytes + 2 * _TARGET_ALIGNMENT, np.uint8)
        start = -target.ctypes.data % _TARGET_ALIGNMENT
        for into in (target[start : start + num_bytes], target[start + 8 : start + 8 + num_bytes]):
            checksums = copy_checked([into.ctypes.data], [source.ctypes.data], num_bytes)
            if checksums != [xxhash.xxh3_64_intdigest(source.data)] or not np.array_equal(into, source):
                return False
    return True
