"""relevo chaos …: makes a running local stack fail, to see that its users don't notice.

Signals go to the processes of a `relevo serve` on this machine. What happens inside its KV agent is asked of the agent
by a process of `services`, which nothing here imports.
"""

from __future__ import annotations

import random as random_numbers
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Annotated

import typer

from relevo.child import DEATHS_SECONDS, MAX_DEATHS
from relevo.core.errors import InvalidRequest, NotFound, Unavailable
from relevo.stack_state import ChildState, StackState, find_stack, is_running, send_signal

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Make a stack of this machine's fail: `relevo serve --chaos`."
)

Port = Annotated[
    int | None, typer.Option(min=1, max=65535, help="the stack's HTTP port; not needed if there is only one")
]
Probability = Annotated[float, typer.Option(min=0, max=1, help="of each operation of the KV agent")]

_MAX_STOP_SECONDS = 3600.0
_NO_FAULTS = ("--delay-probability=0", "--drop-probability=0", "--cut-probability=0")


@app.callback()
def root() -> None:
    """Make a stack of this machine's fail: `relevo serve --chaos`."""


@app.command()
def status(*, port: Port = None) -> None:
    """The stack's processes, and what its KV agent is set to do."""
    stack = find_stack(port)
    print(f"{stack.endpoint}, started {'with' if stack.has_chaos else 'without'} --chaos")
    for child in stack.children:
        print(f"  {child.name:<12} gRPC {child.address:<22} {_describe(child)}")
    if _has_faulty_agent(stack):
        _ask_agent(stack, "set")


@app.command()
def kill(name: Annotated[str, typer.Argument(metavar="NAME")], *, port: Port = None) -> None:
    """Kill a process, with SIGKILL."""
    _kill(find_stack(port), name)


@app.command()
def stop(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    *,
    seconds: Annotated[float, typer.Option(min=0, max=_MAX_STOP_SECONDS, help="until it goes on")] = 5.0,
    port: Port = None,
) -> None:
    """Stop a process, with SIGSTOP, and let it go on after a while."""
    _stop(find_stack(port), name, seconds)


@app.command()
def delay(
    *,
    ms: Annotated[float, typer.Option(min=0, max=60_000, help="how much longer it takes")] = 100.0,
    probability: Probability = 0.1,
    port: Port = None,
) -> None:
    """From now on the KV agent takes longer now and then."""
    _ask_agent(find_stack(port), "set", f"--delay-ms={ms}", f"--delay-probability={probability}")


@app.command()
def drop(*, probability: Probability = 0.1, port: Port = None) -> None:
    """From now on the KV agent's calls fail now and then."""
    _ask_agent(find_stack(port), "set", f"--drop-probability={probability}")


@app.command()
def cut(*, probability: Probability = 0.1, port: Port = None) -> None:
    """From now on the KV agent's streams end in the middle now and then."""
    _ask_agent(find_stack(port), "set", f"--cut-probability={probability}")


@app.command()
def corrupt(
    *,
    blocks: Annotated[int, typer.Option(min=1, help="how many of those that the KV agent holds")] = 1,
    port: Port = None,
) -> None:
    """Flip a bit in blocks in shared memory."""
    _ask_agent(find_stack(port), "corrupt", f"--blocks={blocks}")


@app.command()
def clear(*, port: Port = None) -> None:
    """No more delays, drops and cuts."""
    _ask_agent(find_stack(port), "set", *_NO_FAULTS)


@app.command()
def random(
    *,
    every: Annotated[float, typer.Option(min=0.01, help="seconds between two faults")] = 5.0,
    seconds: Annotated[float, typer.Option(min=0.01, help="until it is over")] = 60.0,
    seed: Annotated[int, typer.Option(min=0, help="the same seed, the same sequence")] = 0,
    port: Port = None,
) -> None:
    """One fault after another, of all kinds and chosen at random, each printed; at the end they are cleared."""
    stack = find_stack(port)
    numbers = random_numbers.Random(seed)
    kills: list[float] = []  # when
    deadline = time.monotonic() + seconds
    try:
        if _has_faulty_agent(stack):
            _try_agent(stack, "set", f"--faults-seed={seed}")
        while (now := time.monotonic()) < deadline:
            _do_any(find_stack(stack.port), numbers, min(every, deadline - now), kills)
            time.sleep(max(0.0, min(every, deadline - time.monotonic())))
    finally:
        if _has_faulty_agent(stack):
            _try_agent(stack, "set", *_NO_FAULTS)


def _do_any(stack: StackState, numbers: random_numbers.Random, seconds: float, kills: list[float]) -> None:
    """seconds: the longest that it may take. The router is spared: it is the one whose absence clients must notice."""
    kinds = ["kill", "stop", "delay", "drop", "cut", "corrupt"] if _has_faulty_agent(stack) else ["kill", "stop"]
    kind = numbers.choice(kinds)
    names = [child.name for child in stack.children if child.is_ready and child.process and child.role != "router"]
    if kind == "kill" and len([at for at in kills if time.monotonic() - at < DEATHS_SECONDS]) >= MAX_DEATHS:
        kind = "stop"  # or, if they hit one and the same, `relevo serve` would give it up
    match kind:
        case "kill" | "stop" if not names:
            _say("nothing is ready to be killed or stopped at this moment")
        case "kill":
            kills.append(time.monotonic())
            _try(_kill, stack, numbers.choice(names))
        case "stop":
            _try(_stop, stack, numbers.choice(names), numbers.uniform(0.2, 1) * seconds)
        case "delay":
            ms, probability = round(numbers.uniform(1, 200)), round(numbers.uniform(0, 0.3), 2)
            _try_agent(stack, "set", f"--delay-ms={ms}", f"--delay-probability={probability}")
        case "drop" | "cut":
            _try_agent(stack, "set", f"--{kind}-probability={round(numbers.uniform(0, 0.3), 2)}")
        case "corrupt":
            _try_agent(stack, "corrupt", f"--blocks={numbers.randint(1, 16)}")


def _kill(stack: StackState, name: str) -> None:
    child = _child(stack, name)
    _signal(child, signal.SIGKILL)
    _say(f"killed {_pid(child)}")


def _stop(stack: StackState, name: str, seconds: float) -> None:
    child = _child(stack, name)
    previous = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:  # however this is left, it goes on
        _signal(child, signal.SIGSTOP)
        _say(f"stopped {_pid(child)} for {seconds:.1f} s")
        time.sleep(seconds)
    finally:
        assert child.process is not None
        goes_on = send_signal(child.process, signal.SIGCONT)
        for number, handler in previous.items():
            signal.signal(number, handler)
    _say(f"{name} goes on" if goes_on else f"{name} has ended meanwhile")


def _leave(_number: int, _frame: object) -> None:
    raise SystemExit(1)


def _child(stack: StackState, name: str) -> ChildState:
    for child in stack.children:
        if child.name == name:
            return child
    raise InvalidRequest(f"no process is called {name!r}: there are {', '.join(c.name for c in stack.children)}")


def _signal(child: ChildState, number: signal.Signals) -> None:
    if child.process is None or not send_signal(child.process, number):
        raise NotFound(f"{child.name} is not running at this moment: `relevo serve` starts it again")


def _pid(child: ChildState) -> str:
    assert child.process is not None
    return f"{child.name} (pid {child.process.pid})"


def _describe(child: ChildState) -> str:
    if child.process is None or not is_running(child.process):
        return "dead"
    return f"pid {child.process.pid}" + ("" if child.is_ready else ", starting")


def _agents(stack: StackState) -> list[ChildState]:
    return [child for child in stack.children if child.role == "kvtransfer"]


def _has_faulty_agent(stack: StackState) -> bool:
    return stack.has_chaos and bool(_agents(stack))


def _ask_agent(stack: StackState, action: str, *options: str) -> None:
    """Prints what the agent says. Its token and certificates come from the environment, as for `relevo kv`."""
    if not stack.has_chaos:
        raise Unavailable(f"the stack at {stack.endpoint} was started without --chaos: its agent does no such thing")
    agents = _agents(stack)
    if not agents:
        raise Unavailable(f"the stack at {stack.endpoint} is aggregated: it has no KV agent")
    command = [sys.executable, "-m", "services.kvtransfer.chaos_control", f"--action={action}"]
    for agent in agents:
        result = subprocess.run(
            [*command, f"--agent={agent.address}", *options], stdout=subprocess.PIPE, text=True, check=False
        )
        if result.returncode:
            raise typer.Exit(result.returncode if result.returncode > 0 else 1)
        _say(f"{agent.name}: {result.stdout.strip()}")


def _try_agent(stack: StackState, action: str, *options: str) -> None:
    """An agent that was killed just now cannot be asked; it comes back without faults."""
    try:
        _ask_agent(stack, action, *options)
    except typer.Exit:
        _say("kvtransfer: not to be had at this moment")


def _try(fault: Callable[..., None], *arguments: object) -> None:
    """A process that has just died by itself is no reason to stop."""
    try:
        fault(*arguments)
    except NotFound as error:
        _say(error.message)


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
