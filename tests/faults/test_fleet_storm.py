"""Two prefill and two decode workers, of which one is killed or stopped every few seconds: no client notices.

`make test` does it for a minute. RELEVO_STORM_SECONDS=600 does it for ten, with a fault every 10 s.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from relevo.core.sampling_params import SamplingParams
from services.kvtransfer.agent import Agent
from services.router.request_stream import DECODE, PREFILL
from tests.faults.stack import NUM_PAGES, Clients, flags, router
from tests.faults.test_storm import make_prompts, transformers_greedy
from tests.faults.zygote import Forked, Role, Zygote
from tests.support.agents import TIMEOUT_SECONDS, is_unused, running_agent, until

STORM_SECONDS = float(os.environ.get("RELEVO_STORM_SECONDS", "60"))
FAULT_SECONDS = 10.0 if STORM_SECONDS >= 300 else 3.0  # from one to the next
NUM_CLIENTS = 16
NUM_TOKENS = 24
SILENCE_SECONDS = 2.5  # after which a worker that was stopped counts as dead
STOPS_SECONDS = (0.3, 1.0, 2 * SILENCE_SECONDS)
LEASE_SECONDS = 2.0


@dataclass(frozen=True)
class Question:
    prompt: list[int]
    sampling: SamplingParams


def make_questions() -> list[Question]:
    """Greedy ones, and of every second prompt a sampled one too, with all that depends on the output so far."""
    questions = []
    for number, prompt in enumerate(make_prompts()):
        questions.append(Question(prompt, SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, seed=0)))
        if number % 2:
            sampling = SamplingParams(
                max_tokens=NUM_TOKENS,
                temperature=0.9,
                top_p=0.95,
                seed=number,
                frequency_penalty=0.3,
                repetition_penalty=1.1,
                min_tokens=8,
            )
            questions.append(Question(prompt, sampling))
    return questions


@dataclass
class Counts:
    is_over: bool = False  # no new requests
    num_requests: int = 0
    num_moved: int = 0  # that saw more than one worker
    failures: list[str] = field(default_factory=list)
    wrong: list[int] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        faults = ", ".join(f"{kind} {count}" for kind, count in sorted(self.faults.items()))
        return (
            f"{self.num_requests} requests, {self.num_moved} moved, {len(self.failures)} failed,"
            f" {len(self.wrong)} wrong; {faults}"
        )


class Workers:
    """Processes, each of which comes back on its port."""

    def __init__(self, zygote: Zygote, model: Path, agent: Agent) -> None:
        self._zygote = zygote
        self._flags = [*flags(model, agent.address), f"--lease-seconds={LEASE_SECONDS}"]
        self.running: dict[str, Forked] = {}  # by name

    async def start(self, role: Role, name: str, port: str = "0") -> None:
        more = (*self._flags, f"--port={port}", f"--worker-id={name}")
        self.running[name] = await asyncio.to_thread(self._zygote.start, role, *more)

    async def kill(self, name: str) -> None:
        """And start it again."""
        forked = self.running[name]
        forked.send(signal.SIGKILL)
        assert await asyncio.to_thread(forked.wait) == -signal.SIGKILL
        role: Role = "prefill" if name.startswith("prefill") else "decode"
        await self.start(role, name, forked.port)

    async def stop(self, name: str, seconds: float) -> None:
        """And let it go on."""
        self.running[name].send(signal.SIGSTOP)
        await asyncio.sleep(seconds)
        self.running[name].send(signal.SIGCONT)

    async def end(self) -> None:
        for forked in self.running.values():
            await asyncio.to_thread(forked.end, signal.SIGKILL)


@asynccontextmanager
async def running(zygote: Zygote, model: Path, folder: Path) -> AsyncIterator[tuple[Workers, Clients]]:
    """At the end no slot may be granted or pinned, no lease or stream open, and every block back at every worker."""
    async with running_agent(folder, num_blocks=NUM_PAGES) as agent:
        workers = Workers(zygote, model, agent)
        try:
            for role in ("prefill", "decode"):
                for number in range(2):
                    await workers.start(role, f"{role}-{number}")
            addresses = {name: forked.address for name, forked in workers.running.items()}
            async with router(
                [addresses["decode-0"], addresses["decode-1"]],
                [addresses["prefill-0"], addresses["prefill-1"]],
                silence_seconds=SILENCE_SECONDS,
            ) as clients:
                yield workers, clients
                await clients.until_connected(PREFILL, 2)
                await clients.until_connected(DECODE, 2)
                await clients.until_whole()
                await until(lambda: is_unused(agent))
        finally:
            await workers.end()


async def ask_on_and_on(
    client: int, clients: Clients, questions: list[Question], expected: list[list[int]], counts: Counts
) -> None:
    numbers = random.Random(client)
    while not counts.is_over:
        number = numbers.randrange(len(questions))
        question = questions[number]
        counts.num_requests += 1
        try:
            # A salt lasts for some requests: what is cached helps now and then.
            answer = await clients.generate(question.prompt, question.sampling, salt=str(counts.num_requests // 20))
        except Exception as error:
            counts.failures.append(f"{type(error).__name__}: {error}")
            continue
        counts.num_moved += answer.num_tries > 1
        if answer.token_ids != expected[number]:
            counts.wrong.append(number)


async def cause_faults(workers: Workers, clients: Clients, counts: Counts) -> None:
    """One after another, each when the last one is got over."""
    numbers = random.Random(5)
    loop = asyncio.get_running_loop()
    end_at = loop.time() + STORM_SECONDS
    while loop.time() < end_at:
        next_at = loop.time() + FAULT_SECONDS
        name = numbers.choice(sorted(workers.running))
        kind = "SIGKILL" if numbers.random() < 0.5 else "SIGSTOP"
        counts.faults[f"{kind} {name}"] += 1
        if kind == "SIGKILL":
            await workers.kill(name)
        else:
            await workers.stop(name, numbers.choice(STOPS_SECONDS))
        await clients.until_connected(PREFILL, 2)
        await clients.until_connected(DECODE, 2)
        await asyncio.sleep(max(0.0, next_at - loop.time()))


@pytest.mark.timeout(STORM_SECONDS + 90)
async def test_nobody_notices_that_workers_die_and_hang(zygote: Zygote, model: Path, tmp_path: Path) -> None:
    questions = make_questions()
    async with running(zygote, model, tmp_path) as (workers, clients):
        expected = [
            (await clients.generate(question.prompt, question.sampling, salt="before")).token_ids
            for question in questions
        ]
        greedy = [
            answer for question, answer in zip(questions, expected, strict=True) if not question.sampling.temperature
        ]
        assert greedy == await asyncio.to_thread(transformers_greedy, model, make_prompts(), NUM_TOKENS)
        counts = Counts()
        tasks = [
            asyncio.create_task(ask_on_and_on(client, clients, questions, expected, counts))
            for client in range(NUM_CLIENTS)
        ]
        await cause_faults(workers, clients, counts)
        counts.is_over = True
        _, without_end = await asyncio.wait(tasks, timeout=TIMEOUT_SECONDS)
        print(counts)
        assert not without_end, f"{counts}: {len(without_end)} have no end"
        assert not counts.failures and not counts.wrong, f"{counts}: {Counter(counts.failures)}"
        assert counts.num_moved > 0 and counts.num_requests > 10 * STORM_SECONDS, counts
