from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.router.prefix_index import PrefixIndex, split_names

NAMES = [bytes([number]) * 32 for number in range(8)]
WORKERS = ["a", "b", "c"]

operations = st.lists(
    st.tuples(st.sampled_from(["store", "remove", "forget"]), st.sampled_from(WORKERS), st.sets(st.sampled_from(NAMES)))
)


@given(operations, st.lists(st.sampled_from(NAMES)))
def test_agrees_with_a_list_of_pairs(steps: list[tuple[str, str, set[bytes]]], prompt: list[bytes]) -> None:
    index = PrefixIndex()
    held: set[tuple[str, bytes]] = set()
    for what, worker, names in steps:
        if what == "store":
            index.store(worker, names)
            held |= {(worker, name) for name in names}
        elif what == "remove":
            index.remove(worker, names)
            held -= {(worker, name) for name in names}
        else:
            index.forget(worker)
            held = {pair for pair in held if pair[0] != worker}
    for worker in WORKERS:
        expected = 0
        while expected < len(prompt) and (worker, prompt[expected]) in held:
            expected += 1
        assert index.num_cached_blocks(worker, prompt) == expected
        assert index.num_blocks(worker) == sum(1 for pair in held if pair[0] == worker)


def test_hole_ends_the_prefix() -> None:
    index = PrefixIndex()
    index.store("a", NAMES[:5])
    index.remove("a", NAMES[2:3])
    assert index.num_cached_blocks("a", NAMES) == 2


def test_names_are_cut_at_32_bytes_or_refused() -> None:
    assert split_names(b"".join(NAMES)) == NAMES
    assert split_names(b"") == []
    with pytest.raises(ValueError, match="33"):
        split_names(bytes(33))
