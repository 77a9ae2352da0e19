"""Starting and stopping what is compared, each on 127.0.0.1 and as its users would start it on the same cores."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).parent.parent.parent
VENVS = ROOT / ".peers"
START_SECONDS = 600
STOP_SECONDS = 30
MAX_MODEL_LEN = 2048
KV_CACHE_GIB = 2
OURS = ("relevo", "relevo-split")
PEERS = ("vllm", "openvino")
PRINTED_LAST = "Ctrl-C stops it."
CHILD_LINE = re.compile(r"^  (\S+) +.*gRPC \S+ +pid (\d+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Setting:
    """shape: folder with config.json; weights are random. dtype: float32, bfloat16 or float16"""

    shape: Path
    dtype: str
    arguments: Sequence[str] = ()  # for `relevo serve` only


@dataclass(slots=True)
class Server:
    """A running contender. roles: name of each process whose share of the work is asked for, by pid."""

    name: str
    url: str
    process: subprocess.Popen[bytes]
    seconds_to_ready: float
    roles: dict[int, str] = field(default_factory=dict)

    def processes(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            leader = psutil.Process(self.process.pid)
            return [leader, *leader.children(recursive=True)]
        return []

    def cpu_seconds(self) -> dict[str, float]:
        """Of each role's processes up to now; what has no role is "other"."""
        seconds: dict[str, float] = {}
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                role = self.roles.get(process.pid, "other")
                seconds[role] = seconds.get(role, 0.0) + times.user + times.system
        return seconds

    def peak_rss_bytes(self) -> dict[str, int]:
        """VmHWM, the most that each process ever had in memory; of processes without a role under their pid."""
        peaks = {}
        for process in self.processes():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                status = Path(f"/proc/{process.pid}/status").read_text()
                if match := re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE):
                    name = self.roles.get(process.pid) or f"{process.name()} {process.pid}"
                    peaks[name] = int(match[1]) << 10
        return peaks


def install(peer: str) -> None:
    """Into a virtual environment of its own, once. Raises CalledProcessError."""
    subprocess.run([ROOT / "bench/peers/install.sh", peer], check=True)


def prepare(peer: str, setting: Setting) -> None:
    """What is not part of starting: OpenVINO needs the model in a form of its own, made once."""
    if peer == "openvino" and not _openvino_model(setting).exists():
        command = [_python(peer), ROOT / "bench/peers/openvino_model.py", setting.shape, _openvino_model(setting)]
        subprocess.run([*command, setting.dtype], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@contextlib.contextmanager
def running(name: str, setting: Setting) -> Iterator[Server]:
    """A server from its start to its end; nothing of it is left, whatever happens. Raises RuntimeError if it can't."""
    port = _free_port()
    command, environment = _command(name, setting, port)
    # Answers and log go to files: nobody reads a pipe while it is measured.
    with tempfile.TemporaryFile() as output:
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        server = Server(name, f"http://127.0.0.1:{port}", process, 0.0)
        try:
            _await_ready(server, output.fileno())
            server.seconds_to_ready = time.monotonic() - started
            if name in OURS:
                server.roles = _roles(output.fileno())
            yield server
        finally:
            _stop(server)


def _command(name: str, setting: Setting, port: int) -> tuple[list[str], Mapping[str, str]]:
    cores = sorted(os.sched_getaffinity(0))
    if name in OURS:
        topology = "aggregated" if name == "relevo" else "disaggregated"
        command = [sys.executable, "-m", "relevo.cli", "serve", str(setting.shape), "--load-format", "dummy"]
        command += ["--topology", topology, "--dtype", setting.dtype, "--port", str(port)]
        command += ["--max-model-len", str(MAX_MODEL_LEN), "--kv-cache-memory", f"{KV_CACHE_GIB}GiB"]
        return [*command, *setting.arguments], {}
    if name == "vllm":
        # `vllm serve` asks for the version of a package named vllm, which this build is not.
        command = [_python(name), "-m", "vllm.entrypoints.openai.api_server", "--model", str(setting.shape)]
        command += ["--load-format", "dummy", "--skip-tokenizer-init", "--dtype", setting.dtype]
        command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(MAX_MODEL_LEN)]
        command += ["--no-enable-prefix-caching", "--disable-log-stats"]
        environment = {
            "OMP_NUM_THREADS": str(len(cores)),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        return command, environment
    precision = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[setting.dtype]
    command = [_python(name), str(ROOT / "bench/peers/openvino_server.py"), str(_openvino_model(setting))]
    command += ["--port", str(port), "--threads", str(len(cores)), "--kv-cache-gib", str(KV_CACHE_GIB)]
    # By default it would keep keys and values in 8 bits, which nobody else here does.
    return [*command, "--kv-cache-precision", precision], {}


def _python(peer: str) -> str:
    return str(VENVS / peer / "bin/python")


def _openvino_model(setting: Setting) -> Path:
    return VENVS / "models" / f"{setting.shape.name}-{setting.dtype}"


def _await_ready(server: Server, output: int) -> None:
    """Until it has answered with a token: that a port is open says little."""
    deadline = time.monotonic() + START_SECONDS
    with httpx.Client(base_url=server.url, timeout=60) as client:
        while time.monotonic() < deadline:
            if server.process.poll() is not None:
                code = server.process.returncode
                raise RuntimeError(f"{server.name} ended with exit code {code}:\n{_read(output)[-3000:]}")
            with contextlib.suppress(httpx.HTTPError):
                if _gives_a_token(client):
                    return
            time.sleep(0.05)
    raise RuntimeError(f"{server.name} was not ready after {START_SECONDS} s:\n{_read(output)[-3000:]}")


def _gives_a_token(client: httpx.Client) -> bool:
    models = client.get("/v1/models")
    if models.status_code != 200 or not models.json()["data"]:
        return False
    body = {"model": models.json()["data"][0]["id"], "prompt": [1, 2, 3, 4], "max_tokens": 1, "stream": True}
    return client.post("/v1/completions", json=body).status_code == 200


def _roles(output: int) -> dict[int, str]:
    """Read off what `relevo serve` prints, which it does a moment after its endpoint serves."""
    deadline = time.monotonic() + STOP_SECONDS
    while PRINTED_LAST not in (printed := _read(output)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return {int(pid): child for child, pid in CHILD_LINE.findall(printed)}


def _stop(server: Server) -> None:
    """Ctrl-C, and kill what of it is still there after STOP_SECONDS."""
    processes = server.processes()
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(STOP_SECONDS)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()  # knows by its start time that the pid is not somebody else's by now
    server.process.wait()


def _read(output: int) -> str:
    return os.pread(output, 1 << 22, 0).decode(errors="replace")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
