"""`relevo serve` as a user runs it: real processes, the real openai client, Ctrl-C, and nothing left behind."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest

from relevo import demo
from relevo.engine.turns import Turns
from services.pb import kvtransfer_pb2, kvtransfer_pb2_grpc, router_pb2, router_pb2_grpc
from tests.support.tiny_models import TinyModels

START_SECONDS = 90  # two cores, shared with another test process
MODEL = "relevo-demo"
CHAT = [{"role": "user", "content": "What does os.path.join do?"}]
LONG_PROMPT = "import os\n" * 60
SMALL_WORKERS = ["--dtype", "float32", "--kv-cache-memory", "128MiB"]
SMALL = [*SMALL_WORKERS, "--kv-arena", "64MiB"]


@dataclass(frozen=True)
class Child:
    name: str
    grpc_address: str
    pid: int


class Serve:
    """A running `relevo serve`."""

    def __init__(self, *options: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "relevo.cli", "serve", *options, "--port", str(self.port)]
        # A file: a pipe that nobody reads would hold up whoever writes to it, once it is full.
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115  # kill() closes it
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._stderr, text=True)
        self.printed = self._read_until("Ctrl-C stops it.")
        pattern = r"^  (\S+) +.*gRPC (\S+) +pid (\d+)$"
        self.children = [
            Child(name, address, int(pid)) for name, address, pid in re.findall(pattern, self.printed, re.M)
        ]
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=60)

    def _read_until(self, end: str) -> str:
        assert self.process.stdout is not None
        lines = []
        deadline = time.monotonic() + START_SECONDS
        for line in self.process.stdout:
            lines.append(line)
            if end in line:
                return "".join(lines)
            assert time.monotonic() < deadline
        raise AssertionError(f"did not start: {''.join(lines)}{self.end(seconds=10)}")

    def child(self, name: str) -> Child:
        return next(child for child in self.children if child.name == name)

    def stop(self) -> tuple[int, str]:
        """Ctrl-C; exit code and what was said on stderr."""
        self.process.send_signal(signal.SIGINT)
        error = self.end()
        return self.process.returncode, error

    def end(self, seconds: float = 40) -> str:
        """Wait for it to end by itself; what was said on stderr."""
        self.process.communicate(timeout=seconds)
        self._stderr.seek(0)
        return self._stderr.read()

    def kill(self) -> None:
        """Whatever happened: nothing of it goes on."""
        self.process.kill()
        self.process.communicate(timeout=10)
        self._stderr.close()
        self.client.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def arena_files() -> set[Path]:
    return set(Path(os.environ["RELEVO_ARENA_DIR"]).iterdir())


@pytest.fixture(scope="module", autouse=True)
def arena_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder of our own in shared memory: what is left there was left by us, not by tests that run beside."""
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm", prefix="relevo-e2e-") as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RELEVO_ARENA_DIR", folder)
        patch.setenv(
            "XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime"))
        )  # a launcher that is killed leaves a file
        yield


@pytest.fixture(scope="module")
def split(arena_dir: None) -> Iterator[Serve]:
    """One prefill, one decode. At the end: Ctrl-C, exit code 0, nothing said on stderr, nothing left."""
    serve = Serve(*SMALL)
    before = arena_files()
    assert len(before) == 1
    try:
        yield serve
        wait_until_whole(serve)
        code, error = serve.stop()
        assert (code, error) == (0, "")
        assert not [child for child in serve.children if is_alive(child.pid)]
        assert not before & arena_files()
    finally:
        serve.kill()


def wait_until_whole(serve: Serve) -> None:
    """Until nothing is running and every block, slot and pin is accounted for."""
    deadline = time.monotonic() + 10
    while (leaks := find_leaks(serve)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not leaks


def find_leaks(serve: Serve) -> list[str]:
    leaks = []
    with grpc.insecure_channel(serve.child("router").grpc_address) as channel:
        reply = router_pb2_grpc.RouterStub(channel).ListWorkers(router_pb2.ListWorkersRequest(), timeout=10)
    for worker in reply.workers:
        state = (worker.num_requests, worker.load.num_running, worker.load.num_waiting)
        if state != (0, 0, 0) or worker.load.num_free_blocks != worker.info.num_blocks:
            leaks.append(f"{worker.info.worker_id}: {state}, {worker.load.num_free_blocks} of {worker.info.num_blocks}")
    with grpc.insecure_channel(serve.child("kvtransfer").grpc_address) as channel:
        audit = kvtransfer_pb2_grpc.KvTransferStub(channel).Audit(kvtransfer_pb2.AuditRequest(), timeout=10)
    if audit.num_granted or audit.num_pinned or audit.num_leases or audit.num_fetches:
        leaks.append(f"agent: {audit}")
    if audit.num_free + audit.num_granted + audit.num_sealed != audit.num_slots:
        leaks.append(f"agent does not add up: {audit}")
    return leaks


def test_prints_endpoint_curl_and_one_line_a_process(split: Serve) -> None:
    assert f"{split.url}/v1" in split.printed
    assert [child.name for child in split.children] == ["kvtransfer", "prefill-0", "decode-0", "router"]
    assert all(is_alive(child.pid) for child in split.children)
    curl = split.printed.split("Try it:")[1].split("Ctrl-C")[0].strip()
    answer = subprocess.run(["bash", "-c", f"{curl} -sS"], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(answer.stdout)["choices"][0]["message"]["content"]


def test_chat_streams_and_answers_whole_alike(split: Serve) -> None:
    options = {"model": MODEL, "messages": CHAT, "max_tokens": 24, "seed": 3}
    whole = split.client.chat.completions.create(**options)  # type: ignore[call-overload]
    chunks = list(
        split.client.chat.completions.create(  # type: ignore[call-overload]
            **options, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == chunks[-1].usage.model_copy(update={"total_tokens": whole.usage.total_tokens})


def test_split_direct_and_offline_answers_are_the_same(split: Serve) -> None:
    """A long prompt takes the way over prefill, its repetition is cached at decode, and LLM has no services at all."""
    offline = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from relevo import LLM, SamplingParams;"
            "llm = LLM(dtype='float32', kv_cache_memory=64 << 20);"
            "p = SamplingParams(max_tokens=32, temperature=0.8, top_p=0.9, seed=5);"
            f"a = llm.generate({LONG_PROMPT!r}, p, progress=False);"
            "sys.stdout.write(a[0].text)",
        ],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    ask: dict[str, Any] = {"prompt": LONG_PROMPT, "max_tokens": 32, "temperature": 0.8, "top_p": 0.9, "seed": 5}
    answers = [split.client.completions.create(model=MODEL, **ask) for _ in range(2)]
    assert [answer.choices[0].text for answer in answers] == [offline.stdout] * 2
    first, second = (answer.usage.prompt_tokens_details.cached_tokens for answer in answers)
    assert (first or 0) < (second or 0)
    with grpc.insecure_channel(split.child("kvtransfer").grpc_address) as channel:
        audit = kvtransfer_pb2_grpc.KvTransferStub(channel).Audit(kvtransfer_pb2.AuditRequest(), timeout=10)
    assert audit.num_sealed > 0, "nothing was handed over: the split way was not taken"


async def test_64_concurrent_mixed_requests_are_all_right(split: Serve) -> None:
    """Each answer equals the one its request gets alone."""
    prompts = ["def main(", "import os\n" * 20, "class Stack:\n" * 30, "The quick brown fox"]
    variants: list[dict[str, Any]] = [
        {"max_tokens": 8, "temperature": 0},
        {"max_tokens": 12, "temperature": 0.9, "seed": 4, "top_p": 0.9},
        {"max_tokens": 10, "temperature": 0.7, "seed": 5, "frequency_penalty": 0.5, "extra_body": {"top_k": 20}},
        {"max_tokens": 9, "temperature": 0, "logprobs": 2},
    ]
    async with openai.AsyncOpenAI(base_url=f"{split.url}/v1", api_key="unused", max_retries=0, timeout=100) as client:

        async def ask(index: int) -> str:
            options: dict[str, Any] = {"model": MODEL, "prompt": prompts[index % 4], **variants[index // 4 % 4]}
            if index % 3:
                answer = await client.completions.create(**options)
                return str(answer.choices[0].text)
            stream = await client.completions.create(**options, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])

        alone = [await ask(index) for index in range(16)]
        together = await asyncio.gather(*(ask(index) for index in range(64)))
    assert list(together) == alone * 4
    wait_until_whole(split)


async def test_client_that_hangs_up_frees_everything_within_100_ms(split: Serve) -> None:
    """The best of three: other tests run beside this one, and now and then the machine stands still for longer."""
    assert min([await seconds_to_free_after_hang_up(split) for _ in range(3)]) < 0.1
    wait_until_whole(split)


async def seconds_to_free_after_hang_up(serve: Serve) -> float:
    """Like a browser: reads a little of a long answer's stream, then closes the connection."""
    body = {"model": MODEL, "prompt": LONG_PROMPT, "max_tokens": 1000, "stream": True, "ignore_eos": True}
    async with (
        httpx.AsyncClient(base_url=serve.url, timeout=60) as client,
        client.stream("POST", "/v1/completions", json=body) as response,
    ):
        lines = response.aiter_lines()
        for _ in range(6):
            await anext(lines)
    hung_up = time.monotonic()
    with grpc.insecure_channel(serve.child("router").grpc_address) as channel:
        stub = router_pb2_grpc.RouterStub(channel)
        while any(w.num_requests for w in stub.ListWorkers(router_pb2.ListWorkersRequest(), timeout=5).workers):
            assert time.monotonic() < hung_up + 5, "never freed"
    return time.monotonic() - hung_up


def test_workers_take_turns_at_the_cores(split: Serve) -> None:
    """Both map the same memory, which has no name; every computed step takes a turn, of either."""
    files = set()
    for name in ("prefill-0", "decode-0"):
        pid = split.child(name).pid
        arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        path = next(each for each in arguments if each.startswith("--turn-file=")).partition("=")[2]
        files.add(path.replace("self", str(pid)))
    turns = [Turns(path) for path in files]
    before = [each.num_turns for each in turns]
    split.client.completions.create(
        model=MODEL, prompt="import numpy\n" * 50, max_tokens=8, extra_body={"ignore_eos": True}
    )
    after = [each.num_turns for each in turns]
    assert len(turns) == 2 and after[0] == after[1] >= before[0] + 8
    assert before[0] == before[1]


def test_service_by_itself_has_health_and_reflection(split: Serve) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    services = {
        "kvtransfer": "relevo.v1.KvTransfer",
        "prefill-0": "relevo.v1.PrefillService",
        "decode-0": "relevo.v1.DecodeService",
        "router": "relevo.v1.Router",
    }
    for name, service in services.items():
        with grpc.insecure_channel(split.child(name).grpc_address) as channel:
            health = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=10
            )
            assert health.status == health_pb2.HealthCheckResponse.SERVING
            asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            replies = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(asked, timeout=10)
            assert service in {each.name for each in next(replies).list_services_response.service}


def test_bench_serve_measures_the_endpoint(split: Serve, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    options = [
        "--url",
        split.url,
        "--concurrency",
        "1,2",
        "--num-requests",
        "2",
        "--input-len",
        "40",
        "--output-len",
        "4",
    ]
    command = [sys.executable, "-m", "relevo.cli", "bench", "serve", *options, "--json", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "TTFT" in result.stdout
    figures = json.loads(path.read_text())
    assert [each["concurrency"] for each in figures] == [1, 2]
    assert all(each["tpot_ms_p50"] > 0 and 0 < each["ttft_ms_p50"] <= each["ttft_ms_p99"] for each in figures)


def test_chat_command_answers_what_is_piped_in(split: Serve) -> None:
    command = [sys.executable, "-m", "relevo.cli", "chat", "--url", split.url, "--param", "max_tokens=12"]
    result = subprocess.run(
        [*command, "--param", "temperature=0"], input=CHAT[0]["content"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    options = {"model": MODEL, "messages": CHAT, "max_tokens": 12, "temperature": 0}
    reply = split.client.chat.completions.create(**options)  # type: ignore[call-overload]
    assert result.stdout.strip() == reply.choices[0].message.content.strip()


def test_top_shows_what_runs_and_what_was_asked(split: Serve) -> None:
    command = [sys.executable, "-m", "relevo.cli", "top", "--url", split.url]
    answer = split.client.completions.create(
        model=MODEL, prompt=LONG_PROMPT, max_tokens=5, extra_body={"ignore_eos": True}
    )
    result = subprocess.run([*command, "--once"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    first_words = [line.split()[:3] for line in result.stdout.splitlines()]
    for name in ("prefill-0", "decode-0"):
        assert [name, name.partition("-")[0], "ready"] in first_words
    [request] = [line.split() for line in result.stdout.splitlines() if line.startswith(answer.id)]
    assert answer.usage is not None
    assert {f"{answer.usage.prompt_tokens:,}", "5", "length"} <= set(request)


def test_aggregated_has_no_prefill_and_answers_the_same(split: Serve, tmp_path: Path) -> None:
    """Its options come from a file."""
    config = tmp_path / "relevo.yaml"
    config.write_text("topology: aggregated\napi-key: secret\ndtype: float32\nkv_cache_memory: 128MiB\nport: 1\n")
    serve = Serve("--config", str(config))
    try:
        assert [child.name for child in serve.children] == ["decode-0", "router"]
        assert b"--turn-file" not in Path(f"/proc/{serve.child('decode-0').pid}/cmdline").read_bytes()
        ask = {"model": MODEL, "prompt": LONG_PROMPT, "max_tokens": 16, "temperature": 0}
        with pytest.raises(openai.AuthenticationError):
            serve.client.completions.create(**ask)  # type: ignore[call-overload]
        client = serve.client.with_options(api_key="secret")
        answer = client.completions.create(**ask)  # type: ignore[call-overload]
        assert answer.choices[0].text == split.client.completions.create(**ask).choices[0].text  # type: ignore[call-overload]
        assert serve.stop() == (0, "")
    finally:
        serve.kill()


def test_two_routers_share_the_port_and_one_may_die() -> None:
    serve = Serve("--topology", "aggregated", "--router-workers", "2", "--kv-cache-memory", "128MiB")
    try:
        assert [child.name for child in serve.children] == ["decode-0", "router", "router-1"]
        ask = {"model": MODEL, "prompt": LONG_PROMPT, "max_tokens": 4, "temperature": 0}

        def answers() -> set[tuple[str, str]]:
            """From a connection each: what was said, and by which process (when it made a metric tells)."""
            found = set()
            for _ in range(32):
                with httpx.Client(base_url=serve.url, timeout=60) as client:
                    said = client.post("/v1/completions", json=ask).raise_for_status().json()["choices"][0]["text"]
                    figures = client.get("/metrics").text
                    [started] = re.findall(r"^relevo_event_loop_lag_seconds_created (\S+)$", figures, re.M)
                    found.add((said, started))
            return found

        before = answers()
        assert len({said for said, _ in before}) == 1
        assert len({started for _, started in before}) == 2  # by chance all go to one: 1 in 2 billion
        os.kill(serve.child("router-1").pid, signal.SIGKILL)
        after = answers()  # of the other, and of the one that takes its place
        assert {said for said, _ in after} == {said for said, _ in before}
        code, error = serve.stop()
        assert code == 0 and "router-1" in error
    finally:
        serve.kill()


def test_launcher_that_is_killed_takes_its_children_along() -> None:
    before = arena_files()
    serve = Serve(*SMALL)
    serve.kill()
    deadline = time.monotonic() + 20
    while any(is_alive(child.pid) for child in serve.children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [child for child in serve.children if is_alive(child.pid)]
    assert arena_files() <= before


def test_without_restarts_a_dead_worker_stops_the_stack_and_is_named() -> None:
    serve = Serve("--topology", "aggregated", "--no-restart", *SMALL_WORKERS)
    pid = serve.child("decode-0").pid
    os.kill(pid, signal.SIGKILL)
    error = serve.end()
    assert serve.process.returncode == 1
    serve.kill()
    assert f"relevo: error: decode-0 (pid {pid}) died: signal SIGKILL; stopped the rest" in error
    assert not [child for child in serve.children if is_alive(child.pid)]


def refused(*arguments: str) -> str:
    """stderr of a `relevo serve` that can't start: it must leave nothing behind."""
    before = arena_files()
    command = [sys.executable, "-m", "relevo.cli", "serve", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=START_SECONDS, check=False)
    assert result.returncode == 1, result.stdout
    assert arena_files() <= before
    assert "Traceback" not in result.stderr
    return result.stderr.strip()


def test_port_in_use_is_one_line() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        error = refused("--port", str(port))
    assert error.count("\n") == 0
    assert f"127.0.0.1:{port}" in error


def test_unknown_model_is_one_line(tmp_path: Path) -> None:
    error = refused(str(tmp_path / "nothing"))
    assert error.count("\n") == 0
    assert "nothing" in error


def test_unsupported_architecture_is_refused_by_name(tiny_models: TinyModels) -> None:
    error = refused(str(tiny_models.path("mamba")), "--topology", "aggregated", "--port", str(free_port()))
    assert "MambaForCausalLM" in error.splitlines()[0]


def test_model_that_does_not_fit_in_memory_is_refused(tmp_path: Path) -> None:
    config = json.loads((demo.target_path() / "config.json").read_text())
    config |= {"hidden_size": 65536, "intermediate_size": 262144, "num_hidden_layers": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    error = refused(str(tmp_path), "--load-format", "dummy", "--topology", "aggregated", "--port", str(free_port()))
    assert "memory" in error.splitlines()[0]


def test_aggregated_refuses_what_only_the_split_has(tmp_path: Path) -> None:
    path = tmp_path / "relevo.yaml"
    path.write_text("topology: aggregated\nkv-arena: 1GiB\n")
    for flag, arguments in (
        ("--kv-disk", ("--topology", "aggregated", "--kv-disk", str(tmp_path))),
        ("--prefill", ("--topology", "aggregated", "--prefill", "1")),
        ("--kv-arena", ("--config", str(path))),
    ):
        error = refused(*arguments, "--port", str(free_port()))
        assert error.startswith(f"relevo: error: {flag} has no effect with --topology aggregated")
        assert error.count("\n") == 0


def test_config_file_sets_options_and_names_unknown_ones(tmp_path: Path) -> None:
    path = tmp_path / "relevo.yaml"
    path.write_text("prot: 8001\n")
    error = refused("--config", str(path))
    assert "'prot'" in error
