"""The slot table alone: every rule, then random sequences of operations."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from relevo.core.errors import Exhausted, InvalidRequest
from services.kvtransfer.slots import SlotTable

from .blocks import names


def make_table(num_slots: int, *sealed: str) -> SlotTable:
    """A table in which these blocks were sealed, one after another."""
    table = SlotTable(num_slots)
    for label in sealed:
        lease, _ = table.announce(names(label))
        table.seal(lease, 0, checksum=ord(label))
        table.end_lease(lease)
    return table


def test_announce_grants_what_is_absent_and_names_what_is_sealed() -> None:
    table = make_table(8, "b")
    table.announce(names("c"))  # somebody else writes c
    _, announcement = table.announce(names("a", "b", "c", "d"))
    assert sorted(announcement.granted) == [0, 3]
    assert announcement.sealed == (1,)
    assert len(set(announcement.granted.values())) == 2
    table.check()


def test_announce_that_does_not_fit_holds_nothing() -> None:
    table = make_table(3, "a")
    table.announce(names("b"))
    before = table.audit()
    with pytest.raises(Exhausted, match="3 slots are needed, 2 of 3 can be had"):
        table.announce(names("c", "d", "e"))
    assert table.audit() == before
    table.check()


def test_announce_never_evicts_what_it_announces() -> None:
    table = make_table(2, "a", "b")
    with pytest.raises(Exhausted):
        table.announce(names("a", "c", "d"))
    _, announcement = table.announce(names("a", "c"))
    assert announcement.sealed == (0,)
    assert table.is_sealed(names("a")[0])
    assert not table.is_sealed(names("b")[0])
    table.check()


def test_least_recently_used_is_evicted_first() -> None:
    table = make_table(3, "a", "b", "c")
    reader = table.open_reader()
    table.pin(reader, names("a")[0])
    table.close_reader(reader)
    table.announce(names("x", "y"))
    assert [table.is_sealed(name) for name in names("a", "b", "c")] == [True, False, False]
    assert table.num_evictions == 2


def test_prompts_last_blocks_are_evicted_before_its_first() -> None:
    table = SlotTable(3)
    lease, _ = table.announce(names(0, 1, 2))
    for index in range(3):
        table.seal(lease, index, index)
    table.end_lease(lease)
    table.announce(names("x"))
    assert [table.is_sealed(name) for name in names(0, 1, 2)] == [True, True, False]


def test_pinned_blocks_are_not_evicted() -> None:
    table = make_table(2, "a", "b")
    reader = table.open_reader()
    pinned = table.pin(reader, names("a")[0])
    assert pinned.checksum == ord("a")
    table.announce(names("x"))
    assert table.is_sealed(names("a")[0])
    with pytest.raises(Exhausted):
        table.announce(names("y"))
    table.release(reader, names("a"))
    table.announce(names("y"))
    table.check()


def test_lease_keeps_what_it_sealed_until_its_end() -> None:
    table = SlotTable(1)
    lease, _ = table.announce(names("a"))
    table.seal(lease, 0, 1)
    with pytest.raises(Exhausted):
        table.announce(names("b"))
    table.end_lease(lease)
    table.announce(names("b"))
    table.check()


def test_ended_lease_frees_what_was_not_sealed() -> None:
    table = SlotTable(4)
    lease, _ = table.announce(names("a", "b", "c"))
    table.seal(lease, 1, 7)
    assert table.end_lease(lease) == names("a", "c")
    assert table.end_lease(lease) == []
    audit = table.audit()
    assert (audit.num_free, audit.num_granted, audit.num_sealed, audit.num_leases) == (3, 0, 1, 0)
    table.check()


def test_only_the_granted_may_seal() -> None:
    table = SlotTable(4)
    table.announce(names("a"))
    lease, _ = table.announce(names("a", "b"))
    with pytest.raises(InvalidRequest):
        table.seal(lease, 0, 1)
    with pytest.raises(InvalidRequest):
        table.seal(lease, 2, 1)
    assert table.seal(lease, 1, 1) == names("b")[0]
    assert table.seal(lease, 1, 1) is None, "sealing again is harmless"


def test_block_announced_twice_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        SlotTable(4).announce(names("a", "a"))


def test_dropped_block_is_gone_by_name_and_free_after_its_last_pin() -> None:
    table = make_table(1, "a")
    first, second = table.open_reader(), table.open_reader()
    table.pin(first, names("a")[0])
    table.pin(second, names("a")[0])
    table.drop(first, names("a")[0])
    assert not table.is_sealed(names("a")[0])
    with pytest.raises(Exhausted):
        table.announce(names("a"))
    table.check()
    table.drop(second, names("a")[0])
    table.check()
    assert table.audit().num_free == 1
    table.announce(names("a"))


class SlotTableMachine(RuleBasedStateMachine):
    """Any sequence of operations keeps the invariants, and the table agrees with a plain model of who sees what."""

    leases = Bundle("leases")
    readers = Bundle("readers")

    def __init__(self) -> None:
        super().__init__()
        self.found: set[bytes] = set()  # as the callbacks tell it
        self.table = SlotTable(6, on_sealed=self.found.add, on_gone=self.found.remove)
        self.names = names(*range(10))
        self.checksums: dict[bytes, int] = {}  # what each name was last sealed with
        self.held: dict[int, dict[bytes, int]] = {}  # reader → name → slot

    @rule(target=leases, wanted=st.lists(st.integers(0, 9), max_size=7, unique=True))
    def announce(self, wanted: list[int]) -> tuple[int, list[bytes], dict[int, int]]:
        chosen = [self.names[number] for number in wanted]
        before = self.table.audit()
        try:
            lease, announcement = self.table.announce(chosen)
        except Exhausted:
            assert self.table.audit() == before
            return 0, [], {}
        for index, name in enumerate(chosen):
            assert (index in announcement.sealed) <= self.table.is_sealed(name)
            assert (index in announcement.granted) <= self.table.is_granted(name)
        return lease, chosen, announcement.granted

    @rule(lease=leases, index=st.integers(0, 6), checksum=st.integers(0, 2**64 - 1))
    def seal(self, lease: tuple[int, list[bytes], dict[int, int]], index: int, checksum: int) -> None:
        lease_id, chosen, granted = lease
        if index not in granted or lease_id not in self.table._leases:
            return
        if self.table.seal(lease_id, index, checksum) is not None:
            self.checksums[chosen[index]] = checksum

    @rule(lease=leases, index=st.integers(0, 6))
    def abandon(self, lease: tuple[int, list[bytes], dict[int, int]], index: int) -> None:
        if lease[0] in self.table._leases:
            lease[2].pop(index, None)
            self.table.abandon(lease[0], index)

    @rule(lease=consumes(leases))
    def end_lease(self, lease: tuple[int, list[bytes], dict[int, int]]) -> None:
        self.table.end_lease(lease[0])

    @rule(target=readers)
    def open_reader(self) -> int:
        reader = self.table.open_reader()
        self.held[reader] = {}
        return reader

    @rule(reader=readers, number=st.integers(0, 9))
    def pin(self, reader: int, number: int) -> None:
        name = self.names[number]
        if self.table.is_sealed(name) and name not in self.held[reader]:
            pinned = self.table.pin(reader, name)
            assert pinned.checksum == self.checksums[name]
            self.held[reader][name] = pinned.slot

    @rule(reader=readers, number=st.integers(0, 9), corrupt=st.booleans())
    def release(self, reader: int, number: int, corrupt: bool) -> None:
        name = self.names[number]
        was_pinned = self.held[reader].pop(name, None) is not None
        if corrupt:
            self.table.drop(reader, name)
            assert not was_pinned or not self.table.has_pinned_slot(reader, -1)
        else:
            self.table.release(reader, [name])

    @rule()
    def clear(self) -> None:
        """Free is what nobody uses, and only that."""
        before = self.table.audit()
        num_cleared, num_kept = self.table.clear()
        after = self.table.audit()
        assert num_cleared == before.num_sealed - before.num_pinned == after.num_free - before.num_free
        assert (after.num_granted, after.num_pinned) == (before.num_granted, before.num_pinned)
        assert num_kept == len(list(self.table.blocks()))

    @rule(reader=consumes(readers))
    def close_reader(self, reader: int) -> None:
        self.table.close_reader(reader)
        del self.held[reader]

    @invariant()
    def holds(self) -> None:
        self.table.check()
        audit = self.table.audit()
        assert audit.num_free + audit.num_granted + audit.num_sealed == audit.num_slots
        assert self.found == {name for name in self.names if self.table.is_sealed(name)}
        listed = [held.name for held in self.table.blocks()]
        assert len(listed) == len(set(listed)) == sum(map(self.table.is_here, self.names))
        for reader, pins in self.held.items():
            assert all(self.table.has_pinned_slot(reader, slot) for slot in pins.values())

    def teardown(self) -> None:
        for lease in list(self.table._leases):
            self.table.end_lease(lease)
        for reader in list(self.held):
            self.table.close_reader(reader)
        self.table.check()
        assert self.table.idle
        assert self.table.audit().num_pinned == 0


SlotTableMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSlotTable = SlotTableMachine.TestCase
