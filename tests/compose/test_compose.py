"""`docker compose up`, as a newcomer does it, and what a fleet must stand. In order: one stack, started once."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI, Stream
from openai.types.chat import ChatCompletionChunk

from relevo.demo import target_path
from tests.compose.stack import ComposeStack, say, why_not
from tests.support.containers import docker

pytestmark = [pytest.mark.compose, pytest.mark.timeout(1800)]

MODEL = "relevo-demo"
SLIM_BYTES = 350_000_000  # beyond the base
QUESTION = "What does os.path.join do, and when would one use pathlib instead? " * 12
SAMPLED: dict[str, Any] = {"temperature": 0.8, "seed": 7, "max_tokens": 1200, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def stack() -> Iterator[ComposeStack]:
    """Built and not started; nothing of it is left."""
    if reason := why_not():
        pytest.fail(f"make test-compose needs Docker and Compose: {reason}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    stack = ComposeStack(port, {"KV_CACHE_MEMORY": "256MiB"})
    began = time.monotonic()
    stack.compose("build", timeout=1500)
    say(f"images built in {time.monotonic() - began:.0f} s")
    try:
        yield stack
    finally:
        began = time.monotonic()
        stack.down()
        say(f"down in {time.monotonic() - began:.1f} s")
        assert stack.leftovers() == []


@pytest.fixture(scope="module")
def client(stack: ComposeStack) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{stack.url}/v1", api_key="unused", max_retries=0, timeout=120) as client:
        yield client


def ask(client: OpenAI, content: str, **options: Any) -> str:
    messages: Any = [{"role": "user", "content": content}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, **options)
    return answer.choices[0].message.content or ""


def stream(client: OpenAI, content: str, **options: Any) -> tuple[Stream[ChatCompletionChunk], dict[str, Any]]:
    """The answer as it comes, and the candidate that was taken, with the `request_id`."""
    reply = client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=[{"role": "user", "content": content}],
        stream=True,
        extra_headers={"x-relevo-explain": "1"},
        **options,
    )
    [record] = json.loads(reply.headers["x-relevo-explain"])
    return reply.parse(), record["routes"][-1]["candidates"][0] | {"request_id": reply.headers["x-request-id"]}


def text_of(chunk: ChatCompletionChunk) -> str:
    return (chunk.choices[0].delta.content or "") if chunk.choices else ""


def size_of(image: str) -> int:
    return int(docker("image", "inspect", "--format", "{{.Size}}", image))


def address_of(container: dict[str, Any]) -> str:
    [network] = container["NetworkSettings"]["Networks"].values()
    return str(network["IPAddress"])


def test_images_are_small_and_hold_what_runs(stack: ComposeStack) -> None:
    base = size_of("python:3.11-slim-bookworm")
    slim, engine = size_of("relevo:slim") - base, size_of("relevo:engine") - base
    say(f"relevo:slim {slim / 1e6:.0f} MB and relevo:engine {engine / 1e6:.0f} MB beyond their base")
    assert slim <= SLIM_BYTES
    listing = docker("run", "--rm", "--user", "0", "relevo:engine", "find", "/app", "/opt/relevo", "/home", "/lists")
    paths = [Path(line) for line in listing.splitlines()]
    assert Path("/app/services/router/__main__.py") in paths
    assert {path.name for path in paths if path.parent == Path("/app")} >= {"relevo", "services"}
    unwanted = {"tests", ".git", ".venv", ".cache", ".pytest_cache", "pip"}
    assert not [path for path in paths if path.name in unwanted and path.parts[1] != "home"]
    no_torch = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is not None)"
    docker("run", "--rm", "relevo:slim", "python", "-c", no_torch)


def test_up_serves_the_first_answer(stack: ComposeStack, client: OpenAI) -> None:
    began = time.monotonic()
    stack.compose("up", "--detach")
    stack.until_serving(120)
    answer = ask(client, "What does os.path.join do?", max_tokens=16)
    say(f"cold start: {time.monotonic() - began:.1f} s from `up` to the first answer, {answer!r}")
    assert answer
    stack.until_fleet(60, prefill=1, decode=1)


def test_blocks_go_from_container_to_container(stack: ComposeStack, client: OpenAI) -> None:
    answer, route = stream(client, QUESTION, temperature=0, max_tokens=8)
    assert "".join(map(text_of, answer))
    assert route["prefill"], "a long prompt nobody has cached is split"
    ask_agent = ("-m", "services.kvtransfer.control", "--action", "stats", "--agent", "kvtransfer:50051", "--as-json")
    rows = json.loads(stack.compose("exec", "-T", "kvtransfer", "python", *ask_agent))
    [arena] = [row for row in rows if row["tier"] == "arena"]
    say(f"the agent holds {arena['blocks']} blocks")
    assert arena["blocks"] >= route["num_uncached_tokens"] // 16


def test_all_are_healthy_and_may_do_little(stack: ComposeStack) -> None:
    def all_are_healthy() -> bool:
        states = [container["State"] for container in stack.containers() if "Health" in container["State"]]
        return len(states) == 5 and all(state["Health"]["Status"] == "healthy" for state in states)

    stack.until(all_are_healthy, 60, "all are healthy")
    for container in stack.containers():
        host = container["HostConfig"]
        assert host["ReadonlyRootfs"], container["Name"]
        assert host["CapDrop"] == ["ALL"], container["Name"]
        assert container["Config"]["User"] == "10001:10001", container["Name"]
        published = [port for ports in host["PortBindings"].values() for port in ports]
        is_router = container["Config"]["Labels"]["com.docker.compose.service"] == "router"
        assert [port["HostIp"] for port in published] == ["127.0.0.1"] * is_router


def test_strangers_on_the_network_get_nothing(stack: ComposeStack) -> None:
    """A container that does not have the token, and a user of the host who finds out a worker's address."""
    [decode] = stack.containers("decode")
    code = (
        "import grpc, sys; from services.pb import worker_pb2, worker_pb2_grpc;"
        "channel = grpc.insecure_channel(sys.argv[1]);"
        "worker_pb2_grpc.WorkerStub(channel).GetInfo(worker_pb2.GetInfoRequest(), timeout=10)"
    )
    [network] = decode["NetworkSettings"]["Networks"]
    command = ["docker", "run", "--rm", "--network", network, "relevo:slim", "python", "-c", code]
    refused = subprocess.run(
        [*command, f"{address_of(decode)}:50053"], capture_output=True, text=True, timeout=60, check=False
    )
    assert "UNAUTHENTICATED" in refused.stderr
    assert not docker("exec", decode["Id"], "find", "/run/relevo", "/arena", "-perm", "/077", "-not", "-type", "l")


def test_workers_that_are_added_take_part(stack: ComposeStack, client: OpenAI) -> None:
    began = time.monotonic()
    stack.compose("up", "--detach", "--scale", "prefill=2", "--scale", "decode=2")
    stack.until_fleet(60, prefill=2, decode=2)
    say(f"two of each after {time.monotonic() - began:.1f} s")
    questions = [f"Question {number}: {QUESTION}" for number in range(16)]

    def where(question: str) -> tuple[str, str | None]:
        answer, route = stream(client, question, max_tokens=32)
        assert "".join(map(text_of, answer))
        return route["decode"], route["prefill"]

    with ThreadPoolExecutor(16) as pool:
        placed = list(pool.map(where, questions))
    assert len({decode for decode, _ in placed}) == 2
    assert len({prefill for _, prefill in placed if prefill}) == 2


def test_text_is_whole_when_a_decode_container_is_killed(stack: ComposeStack, client: OpenAI) -> None:
    expected = ask(client, QUESTION, **SAMPLED)
    answer, route = stream(client, QUESTION, **SAMPLED)
    [victim] = [each for each in stack.containers("decode") if route["decode"].startswith(f"{address_of(each)}:")]
    received = [text_of(next(answer)) for _ in range(20)]
    docker("kill", "--signal", "KILL", victim["Id"])
    num_before = len(received)
    received += map(text_of, answer)
    assert "".join(received) == expected
    assert docker("inspect", "--format", "{{.State.ExitCode}}", victim["Id"]) == "137"
    [record] = stack.explain(route["request_id"])
    assert len(record["routes"]) == 2, "it went on elsewhere"
    say(f"{victim['Name'][1:]} killed after {num_before} of {len(received)} pieces: the text is the same")
    stack.until_fleet(30, prefill=2, decode=1)
    docker("start", victim["Id"])
    stack.until_fleet(60, prefill=2, decode=2)


def test_worker_that_crashes_comes_back(stack: ComposeStack) -> None:
    [victim, *_] = stack.containers("prefill")
    subprocess.run(["kill", "-KILL", str(victim["State"]["Pid"])], check=True)
    began = time.monotonic()

    def came_back() -> bool:
        found = json.loads(docker("inspect", victim["Id"]))[0]
        return bool(found["RestartCount"] == 1 and stack.fleet() == {"prefill": 2, "decode": 2})

    stack.until(came_back, 60, "it comes back")
    say(f"a prefill worker that crashed is back after {time.monotonic() - began:.1f} s")


def test_another_model_comes_from_a_mounted_cache(stack: ComposeStack, tmp_path: Path) -> None:
    """As `huggingface_hub` leaves it, readable by everybody and writable by its owner alone."""
    cache = tmp_path / "huggingface"
    model = cache / "hub" / "models--somebody--small"
    snapshot = model / "snapshots" / ("0123456789abcdef" * 3)[:40]
    shutil.copytree(target_path(), snapshot)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(snapshot.name)
    for folder in (tmp_path, *tmp_path.rglob("*")):
        folder.chmod(0o755 if folder.is_dir() else 0o644)
    environment = {"MODEL": "somebody/small", "HF_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    stack.compose("up", "--detach", environment=environment)
    stack.until_serving(120)
    with OpenAI(base_url=f"{stack.url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        assert [each.id for each in client.models.list()] == ["somebody/small"]
        messages: Any = [{"role": "user", "content": "Hello"}]
        answer = client.chat.completions.create(model="somebody/small", messages=messages, max_tokens=8)
    assert answer.choices[0].message.content
    say("MODEL=somebody/small answers, from a mounted cache")


def test_profiles_are_valid(stack: ComposeStack) -> None:
    services = stack.compose("--profile", "gpu", "--profile", "observability", "config", "--services").split()
    assert {"router", "prefill-gpu", "decode-gpu"} <= set(services)
