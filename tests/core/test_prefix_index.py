from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relevo.core.prefix_index import PrefixIndex, split_names

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


@given(operations, st.lists(st.sampled_from(NAMES), max_size=8))
def test_one_lookup_answers_for_all_workers(steps: list[tuple[str, str, set[bytes]]], prompt: list[bytes]) -> None:
    index = PrefixIndex()
    for what, worker, names in steps:
        index.forget(worker) if what == "forget" else getattr(index, what)(worker, names)
    found = index.lookup(prompt)
    assert found == {worker: count for worker in WORKERS if (count := index.num_cached_blocks(worker, prompt))}


def test_prompt_longer_than_a_scan_is_looked_up_to_its_end() -> None:
    names = [number.to_bytes(32) for number in range(1000)]
    index = PrefixIndex()
    index.store("all", names)
    index.store("some", names[:300])
    index.store("hole", [*names[:127], *names[128:]])
    index.store("other", names[1:])
    assert index.lookup(names) == {"all": 1000, "some": 300, "hole": 127}


def test_a_worker_that_comes_back_under_a_recycled_bit_has_nothing_of_the_old_one() -> None:
    """What was forgotten is cleaned up in passing, a part with every change, and never seen in between."""
    names = [number.to_bytes(32) for number in range(5_000)]
    index = PrefixIndex()
    for worker in ("a", "b"):
        index.store(worker, names)
    for life in range(200):
        index.forget("a")
        assert index.lookup(names) == {"b": 5_000}
        index.store("a", names[:life])
        assert index.num_blocks("a") == life
        assert index.lookup(names) == {"b": 5_000, **({"a": life} if life else {})}
    assert index._num_bits < 20, "bits are used again"


def test_nothing_is_kept_for_workers_that_are_gone() -> None:
    index = PrefixIndex()
    names = [number.to_bytes(32) for number in range(10_000)]
    index.store("a", names)
    index.store("b", names[:1])
    index.forget("a")
    for _ in range(12):
        index.store("b", names[:1])
    assert len(index._holders) == 1


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
