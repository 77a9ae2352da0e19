"""`relevo serve --chaos` and `relevo chaos` as a user runs them: what dies comes back, no answer is another one."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from relevo.stack_state import StackState, find_stack
from tests.e2e.test_serve import MODEL, SMALL, Serve, find_leaks, is_alive

PROMPTS = [f"# {name}\n" + "import os\nimport sys\n\n\ndef main(argv):\n" * 16 for name in "abcdefgh"]
BACK_SECONDS = 60  # two cores, shared with another test process


@dataclass
class Stack:
    serve: Serve
    answers: dict[str, str]  # undisturbed

    def chaos(self, *arguments: str) -> str:
        """What it prints."""
        command = [sys.executable, "-m", "relevo.cli", "chaos", *arguments, "--port", str(self.serve.port)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def state(self) -> StackState:
        return find_stack(self.serve.port)

    def pid(self, name: str) -> int:
        [process] = [child.process for child in self.state().children if child.name == name]
        return process.pid if process is not None else 0

    def until_back(self) -> None:
        """All processes are ready."""
        until(lambda: all(child.is_ready and child.process for child in self.state().children))

    def ask(self, prompt: str, salt: str) -> str:
        """salt: another one finds nothing in any cache, so that blocks are handed over."""
        options: dict[str, Any] = {"model": MODEL, "max_tokens": 12, "temperature": 0}
        extra_body = {"ignore_eos": True, "cache_salt": salt}
        return str(
            self.serve.client.completions.create(prompt=prompt, extra_body=extra_body, **options).choices[0].text
        )

    def assert_right(self, salt: str) -> None:
        """All at once: decode workers that are busy leave prompts to prefill."""
        with ThreadPoolExecutor(len(PROMPTS)) as executor:
            answers = list(executor.map(lambda prompt: self.ask(prompt, salt), PROMPTS))
        assert dict(zip(PROMPTS, answers, strict=True)) == self.answers


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + BACK_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """At the end Ctrl-C comes while a process waits to be started again, and nothing may be left."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("runtime")
        patch.setenv("XDG_RUNTIME_DIR", str(folder))
        patch.setenv("RELEVO_ARENA_DIR", str(folder))
        patch.setenv("RELEVO_ABSENT_SECONDS", str(BACK_SECONDS))
        serve = Serve("--chaos", "--decode", "2", *SMALL)
        stack = Stack(serve, {})
        try:
            stack.answers = {prompt: stack.ask(prompt, "undisturbed") for prompt in PROMPTS}
            yield stack
            stack.until_back()
            stack.chaos("kill", "prefill-0")
            until(lambda: stack.pid("prefill-0") == 0)
            pids = [child.process.pid for child in stack.state().children if child.process is not None]
            assert len(pids) == len(serve.children) - 1
            code, said = serve.stop()
            assert code == 0
            for name in ("decode-0", "kvtransfer", "prefill-0", "router"):
                pattern = rf"^\S+ WARNING relevo-serve: {name} \(pid \d+\) died: signal SIGKILL; it is started again in"
                assert re.search(pattern, said, re.M)
            assert not [pid for pid in pids if is_alive(pid)]
            assert not [path for path in folder.rglob("*") if path.is_file()], "an arena or a state file was left"
        finally:
            serve.kill()


def test_status_names_the_processes(stack: Stack) -> None:
    printed = stack.chaos("status")
    for child in stack.serve.children:
        assert f"{child.name:<12} gRPC {child.grpc_address}" in printed and f"pid {child.pid}" in printed
    assert "dropped with 0" in printed


@pytest.mark.parametrize("name", ["decode-0", "kvtransfer", "prefill-0", "router"])
def test_killed_process_is_started_again_and_serves(stack: Stack, name: str) -> None:
    stack.until_back()
    pid = stack.pid(name)
    assert f"killed {name} (pid {pid})" in stack.chaos("kill", name)
    if name != "router":
        stack.assert_right(f"while {name} is away")
    until(lambda: stack.pid(name) not in (pid, 0))
    stack.until_back()
    until(lambda: is_served(stack))
    stack.assert_right(f"after {name}")


def test_who_asks_when_no_decode_worker_is_left_waits_for_one(stack: Stack) -> None:
    stack.until_back()
    for name in ("decode-0", "decode-1"):
        stack.chaos("kill", name)
    stack.assert_right("no decode worker")
    stack.until_back()


def is_served(stack: Stack) -> bool:
    """By the router and all workers that it shall have; nothing is held."""
    try:
        return not find_leaks(stack.serve)
    except grpc.RpcError:
        return False


def test_stopped_prefill_delays_and_changes_nothing(stack: Stack) -> None:
    stack.until_back()
    with ThreadPoolExecutor(1) as executor:
        stopping = executor.submit(stack.chaos, "stop", "prefill-0", "--seconds", "2")
        pid = stack.pid("prefill-0")
        until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        stack.assert_right("stopped")
        assert "prefill-0 goes on" in stopping.result()


MAX_ROUNDS = 20


@pytest.mark.parametrize(
    ("verb", "done"),
    [
        (("drop", "--probability", "0.5"), "dropped"),
        (("cut", "--probability", "0.5"), "cut"),
        (("delay", "--ms", "20", "--probability", "0.5"), "delayed"),
        (("corrupt", "--blocks", "50"), "blocks damaged"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_agent_that_fails_changes_no_token(stack: Stack, verb: tuple[str, ...], done: str) -> None:
    """Of dozens of operations half fail: that none does has odds of less than one in a million."""
    stack.until_back()
    stack.assert_right(f"before {verb[0]}")
    stack.chaos(*verb)
    for number in range(
        MAX_ROUNDS
    ):  # the breaker of prefill may be open after the faults before, and nothing handed over
        stack.assert_right(f"before {verb[0]}" if verb[0] == "corrupt" else f"{verb[0]} {number}")
        if re.search(rf" [1-9]\d* {done}", stack.chaos("status").partition("so far")[2]):
            break
    printed = stack.chaos("clear")
    assert "dropped with 0, its stream cut with 0" in printed
    assert re.search(rf" [1-9]\d* {done}", printed.partition("so far")[2])


def test_random_faults_change_no_token(stack: Stack) -> None:
    """Clients ask all the while."""
    stack.until_back()
    is_over = threading.Event()
    printed: list[str] = []

    def strike() -> None:
        try:
            printed.append(stack.chaos("random", "--every", "0.7", "--seconds", "7", "--seed", "2"))
        finally:
            is_over.set()

    striking = threading.Thread(target=strike)
    striking.start()
    rounds = 0
    while not is_over.is_set():
        stack.assert_right(f"random {rounds}")
        rounds += 1
    striking.join()
    assert rounds and len(printed[0].splitlines()) > 5
    stack.until_back()
    stack.assert_right("after all")
    until(lambda: is_served(stack))
