"""The stack of compose.yaml, driven by whichever Compose is there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.containers import docker

REPOSITORY = Path(__file__).parents[2]


def why_not() -> str | None:
    """What keeps the stack from being started here; None: nothing."""
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "info"], capture_output=True, check=False).returncode
    ):
        return "no Docker engine runs here"
    return None if compose_command() is not None else "neither `docker compose` nor docker-compose is installed"


def compose_command() -> list[str] | None:
    for command in (["docker", "compose"], ["docker-compose"]):
        if (
            shutil.which(command[0])
            and not subprocess.run([*command, "version"], capture_output=True, check=False).returncode
        ):
            return command
    return None


def say(text: str) -> None:
    """For whoever watches: pytest is run with -s."""
    print(f"compose: {time.strftime('%H:%M:%S')} {text}", flush=True)


class ComposeStack:
    """A project of its own, on a port of its own. environment: as a user would set it for `docker compose`."""

    def __init__(self, port: int, environment: Mapping[str, str]) -> None:
        self.project = f"relevo-test-{uuid.uuid4().hex[:8]}"
        self.url = f"http://127.0.0.1:{port}"
        command = compose_command()
        assert command is not None
        self._command = command
        self._environment = {**os.environ, "PORT": str(port), **environment}

    def compose(self, *arguments: str, timeout: float = 300, environment: Mapping[str, str] | None = None) -> str:
        """Standard output. Raises AssertionError with what was said on standard error."""
        result = subprocess.run(
            [*self._command, "--project-name", self.project, *arguments],
            cwd=REPOSITORY,
            env={**self._environment, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert result.returncode == 0, f"compose {' '.join(arguments)}: {result.stdout[-3000:]}{result.stderr[-3000:]}"
        return result.stdout

    def containers(self, service: str | None = None) -> list[dict[str, Any]]:
        """As `docker inspect` describes them, running or not."""
        filters = ["--filter", f"label=com.docker.compose.project={self.project}"]
        if service is not None:
            filters += ["--filter", f"label=com.docker.compose.service={service}"]
        ids = docker("ps", "--all", "--quiet", *filters).split()
        found: list[dict[str, Any]] = json.loads(docker("inspect", *ids)) if ids else []
        return found

    def until_serving(self, seconds: float) -> None:
        self.until(lambda: bool(self._get("/health")), seconds, "the router serves")

    def until_fleet(self, seconds: float, **ready: int) -> None:
        """So many ready workers, by role, as the router counts them."""
        self.until(lambda: self.fleet() == ready, seconds, f"the fleet is {ready}")

    def fleet(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for line in self._get("/metrics").splitlines():
            if line.startswith("relevo_fleet_workers{") and 'condition="ready"' in line:
                role = line.partition('role="')[2].partition('"')[0]
                found[role] = found.get(role, 0) + 1
        return found

    def explain(self, request_id: str) -> list[dict[str, Any]]:
        """Where a request went, and why: one record a choice."""
        found: list[dict[str, Any]] = json.loads(self._get(f"/debug/route/{request_id}"))
        return found

    def _get(self, path: str) -> str:
        """Raises OSError for anything but 200."""
        try:
            with urllib.request.urlopen(f"{self.url}{path}", timeout=5) as reply:
                return str(reply.read().decode())
        except urllib.error.HTTPError as error:
            error.close()
            raise

    def until(self, condition: Any, seconds: float, what: str) -> None:
        """Ask again until it holds. Raises AssertionError with the stack's log when it does not in time."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                if condition():
                    return
            except OSError as error:  # nobody listens yet
                last: object = error
            else:
                last = "it does not hold"
            assert time.monotonic() < deadline, f"{what}? Not after {seconds:g} s: {last}\n{self.logs()}"
            time.sleep(0.1)

    def logs(self) -> str:
        return self.compose("logs", "--tail", "30")

    def down(self) -> None:
        self.compose("down", "--volumes", "--remove-orphans", "--timeout", "20")

    def leftovers(self) -> list[str]:
        """Containers, volumes and networks of this project."""
        mine = f"label=com.docker.compose.project={self.project}"
        listings: Sequence[tuple[str, ...]] = (("ps", "--all"), ("volume", "ls"), ("network", "ls"))
        return [line for kind in listings for line in docker(*kind, "--quiet", "--filter", mine).split()]
