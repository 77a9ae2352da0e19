"""Containers that run this checkout: a plain Python image, with the repository and the installed packages mounted.

Nothing is built and nothing downloaded. The engine is asked by its command line.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

USER = 10001  # nobody's in particular
IMAGE = f"python:{sys.version_info[0]}.{sys.version_info[1]}-slim-bookworm"
_REPOSITORY = Path(__file__).parents[2]


def why_not() -> str | None:
    """What keeps containers from being started here; None: nothing."""
    if shutil.which("docker") is None:
        return "docker is not installed"
    if _run("info").returncode != 0:
        return "no Docker engine runs here"
    if _run("image", "inspect", IMAGE).returncode != 0:
        return f"the image is not there: docker pull {IMAGE}"
    return None


def has_image(image: str) -> bool:
    """A Docker engine runs here, and has it."""
    return shutil.which("docker") is not None and _run("image", "inspect", image).returncode == 0


class Containers:
    """On a network and with a tmpfs volume of their own, as one user. Names are unique to this object."""

    def __init__(self, stack: ExitStack, volume_bytes: int) -> None:
        self._stack = stack
        self.name = f"relevo-test-{uuid.uuid4().hex[:12]}"
        options = f"o=size={volume_bytes},uid={USER},gid={USER},mode=0700"
        docker("volume", "create", "--opt", "type=tmpfs", "--opt", "device=tmpfs", "--opt", options, self.name)
        stack.callback(docker, "volume", "rm", self.name)
        docker("network", "create", self.name)
        stack.callback(docker, "network", "rm", self.name)

    def start(self, role: str, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        """python COMMAND in a container that others reach as address(role); the volume is at /arena."""
        name = self.address(role)
        options = ["--name", name, "--user", f"{USER}:{USER}"]
        options += ["--network", self.name, "--volume", f"{self.name}:/arena"]
        process = subprocess.Popen(
            ["docker", *run_command(command, options, environment)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._stack.callback(_end, name, process)
        return process

    def address(self, role: str) -> str:
        return f"{self.name}-{role}"


@contextmanager
def containers(volume_bytes: int) -> Iterator[Containers]:
    """All are gone at the end, with their network and volume."""
    with ExitStack() as stack:
        yield Containers(stack, volume_bytes)


def run_command(
    command: Sequence[str], options: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> list[str]:
    """Arguments of docker: `run`, what is mounted, and `python COMMAND`."""
    variables = {"PYTHONPATH": "/relevo:/packages", "PYTHONDONTWRITEBYTECODE": "1", **(environment or {})}
    mounts = {_REPOSITORY: "/relevo", Path(sysconfig.get_path("purelib")): "/packages"}
    return [
        *("run", "--rm", "--interactive"),
        *(part for source, target in mounts.items() for part in ("--volume", f"{source}:{target}:ro")),
        *(part for name, value in variables.items() for part in ("--env", f"{name}={value}")),
        *options,
        *("--workdir", "/relevo", IMAGE, "python", *command),
    ]


def docker(*arguments: str) -> str:
    """Its standard output. Raises AssertionError with what it said on standard error."""
    result = _run(*arguments)
    assert result.returncode == 0, f"docker {' '.join(arguments)}: {result.stderr}"
    return result.stdout.strip()


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=30, check=False)


def _end(name: str, process: subprocess.Popen[bytes]) -> None:
    _run("rm", "--force", name)  # it may have ended by itself
    process.wait(20)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
