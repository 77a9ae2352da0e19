"""What a worker that is to be found in Redis must be told."""

from __future__ import annotations

import socket
from contextlib import nullcontext

import pytest

from relevo.core.errors import StartupError
from services.worker.sign_in import check_sign_in
from tests.workers.harness import make_settings

URL = "redis://127.0.0.1:6379/0"


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"discovery": "redis", "redis_url": URL},
        {"discovery": "redis", "redis_url": URL, "host": "0.0.0.0", "advertise_address": "10.0.0.7:50053"},
        {"discovery": "redis", "redis_url": URL, "host": "::", "advertise_address": "[fd00::7]:50053"},
        {"host": "0.0.0.0"},
    ],
)
def test_enough(values: dict[str, str]) -> None:
    check_sign_in(make_settings(**values))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"discovery": "redis"}, "needs --redis-url"),
        ({"discovery": "redis", "redis_url": URL, "host": "0.0.0.0"}, "--advertise-address is missing"),
        ({"discovery": "redis", "redis_url": URL, "advertise_address": "10.0.0.7"}, "host:port is right"),
        ({"discovery": "redis", "redis_url": URL, "advertise_address": "10.0.0.7:http"}, "host:port is right"),
    ],
)
def test_not_enough(values: dict[str, str], reason: str) -> None:
    with pytest.raises(StartupError, match=reason):
        check_sign_in(make_settings(**values))


@pytest.mark.parametrize(
    ("host", "reason"),
    [("10.0.0.7", ""), ("127.0.1.1", "stands for 127.0.1.1, where nobody else reaches it"), (None, "has no address")],
)
def test_auto_is_what_this_hosts_name_stands_for(
    host: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def getaddrinfo(name: str, port: None, type: int) -> list[tuple[object, ...]]:
        assert name == socket.gethostname()
        if host is None:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, type, 6, "", (host, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    settings = make_settings(discovery="redis", redis_url=URL, host="0.0.0.0", advertise_address="auto")
    with pytest.raises(StartupError, match=reason) if reason else nullcontext():
        check_sign_in(settings)


def test_settings_do_not_show_the_password() -> None:
    settings = make_settings(discovery="redis", redis_url="redis://:open-sesame@127.0.0.1:6379/0")
    assert "sesame" not in f"{settings!r} {settings}"
