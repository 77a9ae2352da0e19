from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import pytest

from relevo.core.errors import StartupError
from relevo.core.sampling_params import SamplingParams
from relevo.engine.config import EngineConfig
from relevo.engine.engine import Engine
from relevo.engine.turns import Turns
from tests.support.tiny_models import TinyModels

HOLDER = """
import sys, time
from relevo.engine.turns import Turns
with Turns(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
print("left", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "turns")


class Holder:
    """Another process that has the turn, until it is told to leave, or is killed."""

    def __init__(self, path: str) -> None:
        command = [sys.executable, "-c", HOLDER, path]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.expect("held")

    def expect(self, word: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"{word}\n"

    def end_turn(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=10)


@contextmanager
def holder(path: str) -> Iterator[Holder]:
    process = Holder(path)
    try:
        yield process
    finally:
        process.kill()


def seconds_for_a_turn(turns: Turns) -> float:
    started = time.monotonic()
    with turns:
        return time.monotonic() - started


def test_turns_exclude_one_another_and_nobody_is_passed_over(path: str) -> None:
    """Three engines that always want to compute, with steps of different lengths."""
    order: list[str] = []
    computing = 0
    stopped = threading.Event()

    def engine(name: str, step_seconds: float) -> None:
        nonlocal computing
        turns = Turns(path)
        while not stopped.is_set():
            with turns:
                computing += 1
                assert computing == 1
                order.append(name)
                time.sleep(step_seconds)
                computing -= 1

    threads = [threading.Thread(target=engine, args=(name, ms / 1000)) for name, ms in (("a", 9), ("b", 3), ("c", 6))]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    stopped.set()
    for thread in threads:
        thread.join(10)
    counts = [order.count(name) for name in "abc"]
    assert sum(counts) == Turns(path).num_turns > 30
    assert min(counts) > 0.5 * max(counts), "a turn each, but for when the threads began and what else ran here"


def test_two_alternate_strictly_while_both_want(path: str) -> None:
    order: list[str] = []
    started = threading.Barrier(2)

    def engine(name: str) -> None:
        turns = Turns(path)
        started.wait()
        for _ in range(40):
            with turns:
                order.append(name)
                time.sleep(0.005)  # the other is back at the gate long before

    threads = [threading.Thread(target=engine, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    runs = [len(list(run)) for _, run in groupby(order)]
    assert runs.count(1) >= len(runs) - 4, order  # this machine may stop a thread for longer now and then


def test_alone_nobody_waits(path: str) -> None:
    turns = Turns(path)
    started = time.monotonic()
    for _ in range(1000):
        with turns:
            pass
    assert time.monotonic() - started < 0.5
    assert turns.num_turns == 1000


def test_waits_for_another_process(path: str) -> None:
    turns = Turns(path)
    with holder(path) as other:
        threading.Timer(0.2, other.end_turn).start()
        assert 0.1 < seconds_for_a_turn(turns) < 4


def test_killed_holder_blocks_nobody(path: str, caplog: pytest.LogCaptureFixture) -> None:
    turns = Turns(path, patience_seconds=20)
    with holder(path) as other:
        threading.Timer(0.2, other.process.kill).start()
        assert 0.1 < seconds_for_a_turn(turns) < 4
    assert seconds_for_a_turn(turns) < 0.1
    assert not caplog.records


def test_killed_waiter_blocks_nobody(path: str) -> None:
    turns = Turns(path, patience_seconds=20)
    with turns:
        waiting = subprocess.Popen([sys.executable, "-c", HOLDER, path], stdin=subprocess.DEVNULL)
        time.sleep(0.8)  # at the gate by now; if not, the test shows less, and does not fail
        waiting.kill()
        waiting.wait(10)
    assert seconds_for_a_turn(turns) < 1


def test_hung_holder_is_waited_for_once(path: str, caplog: pytest.LogCaptureFixture) -> None:
    """One warning, then computing goes on beside it; when it is back, turns are taken again."""
    turns = Turns(path, patience_seconds=0.3)
    with holder(path) as other:
        os.kill(other.process.pid, signal.SIGSTOP)
        with caplog.at_level(logging.INFO):
            assert 0.25 < seconds_for_a_turn(turns) < 3
            assert max(seconds_for_a_turn(turns) for _ in range(20)) < 0.1
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert turns.num_turns == 1
        os.kill(other.process.pid, signal.SIGCONT)
        other.end_turn()
        other.expect("left")
        with turns:
            assert turns.num_turns == 2
    with holder(path) as other:
        threading.Timer(0.4, other.end_turn).start()
        assert seconds_for_a_turn(turns) > 0.35, "patience was doubled"


def test_holder_that_takes_many_turns_is_not_taken_for_hung(path: str, caplog: pytest.LogCaptureFixture) -> None:
    """The patience is for one step, however many others come first."""
    turns = Turns(path, patience_seconds=0.2)
    stopped = threading.Event()

    def engine() -> None:
        own = Turns(path)
        while not stopped.is_set():
            with own:
                time.sleep(0.05)

    threads = [threading.Thread(target=engine) for _ in range(6)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        seconds_for_a_turn(turns)
    stopped.set()
    for thread in threads:
        thread.join(10)
    assert not caplog.records


def test_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("x" * 300)
    with pytest.raises(StartupError, match=r"notes\.txt is no file of turns"):
        Turns(str(path))
    assert path.read_text() == "x" * 300
    with pytest.raises(StartupError, match="cannot be opened: No such file"):
        Turns(str(tmp_path / "nowhere" / "turns"))


def test_memory_without_a_name_is_shared_through_its_descriptor() -> None:
    """As `relevo serve` does it."""
    fd = os.memfd_create("turns")
    try:
        command = [sys.executable, "-c", HOLDER, f"/proc/self/fd/{fd}"]
        process = subprocess.run(
            command, input="\n\n", capture_output=True, text=True, timeout=30, check=True, pass_fds=(fd,)
        )
        assert process.stdout == "held\nleft\n"
        assert Turns(f"/proc/self/fd/{fd}").num_turns == 1
    finally:
        os.close(fd)


def test_engine_computes_in_its_turn_only(tiny_models: TinyModels, path: str) -> None:
    model = str(tiny_models.path("llama"))
    engine = Engine(EngineConfig(model=model, dtype="float32", kv_cache_memory=8 << 20, turn_file=path))
    turns = Turns(path)
    taken_at_start = turns.num_turns
    engine.step()
    assert turns.num_turns == taken_at_start, "a step that computes nothing needs no turn"
    engine.submit(engine.make_request("a", [5, 6, 7], SamplingParams(max_tokens=3, temperature=0.0, seed=0)))
    stepping = threading.Thread(target=engine.step)
    with turns:
        stepping.start()
        stepping.join(0.3)
        assert stepping.is_alive()
    stepping.join(10)
    assert not stepping.is_alive()
    assert turns.num_turns == taken_at_start + 2
