"""API keys: the file, names in logs and metrics and never keys, limits of each."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from pathlib import Path

import pytest

from relevo.core.errors import StartupError
from relevo.model_files import GenerationDefaults
from relevo.tokenizer import Tokenizer
from services.common.config import parse_settings
from services.router.config import RouterSettings
from services.router.generation import TokensEvent
from services.router.http.keys import ApiKey, KeyRing, plain_keys, read_keys_file
from services.router.http.limits import TokenBucket
from services.router.http.metrics import MAX_CLIENTS, EdgeMetrics
from tests.router.http.conftest import Edge, make_served, running
from tests.router.http.fakes import HANG
from tests.router.http.test_hang_up import posted

ONE = hashlib.sha256(b"key-of-one").hexdigest()
TWO = hashlib.sha256(b"key-of-two").hexdigest()
BODY = {"prompt": "a", "max_tokens": 1}


def write_keys(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "keys"
    path.write_text(text)
    path.chmod(mode)
    return path


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_a_file_gives_names_and_limits(tmp_path: Path) -> None:
    text = f"# ours\n\n one : {ONE} # first\ntwo:{TWO.upper()}:rps=5, concurrency=8,weight=2.5\n"
    one, two = read_keys_file(write_keys(tmp_path, text))
    assert one == ApiKey("one", bytes.fromhex(ONE))
    assert not one.is_limited
    assert two == ApiKey("two", bytes.fromhex(TWO), rps=5, burst=5, concurrency=8, weight=2.5)
    ring = KeyRing([one, two])
    assert ring.find(b"key-of-one") is one
    assert ring.find(b"key-of-two") is two
    assert ring.find(b"key-of-three") is None
    assert ring.find(bytes.fromhex(ONE)) is None
    assert ring.find(ONE.encode()) is None, "who has read the file gets in nowhere"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("secret-key", "line 1: a line is name:sha256"),
        (f"\none:{ONE[:-1]}", "line 2: what follows 'one' is no SHA-256"),
        ("one:secret-key", "sha256sum"),
        (f"a b:{ONE}", "a line is name:sha256"),
        (f"one:{ONE}:rpm=5", "'rpm' is no limit: rps"),
        (f"one:{ONE}:rps=0", "rps must be a number above 0, not '0'"),
        (f"one:{ONE}:rps=nan", "above 0"),
        (f"one:{ONE}:concurrency", "above 0"),
    ],
)
def test_bad_lines_are_named_without_what_may_be_a_key(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(StartupError) as caught:
        read_keys_file(write_keys(tmp_path, text))
    assert said in caught.value.message
    assert "secret" not in caught.value.message


def test_names_and_keys_are_unique_and_not_none() -> None:
    one = ApiKey("one", bytes.fromhex(ONE))
    with pytest.raises(StartupError, match="name 'one'"):
        KeyRing([one, ApiKey("one", bytes.fromhex(TWO))])
    with pytest.raises(StartupError, match="given twice"):
        KeyRing([one, ApiKey("two", bytes.fromhex(ONE))])
    with pytest.raises(StartupError, match="nobody could get in"):
        KeyRing([])


def test_who_may_write_the_file_may_let_anybody_in(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(StartupError, match="chmod go-w"):
        read_keys_file(write_keys(tmp_path, f"one:{ONE}", 0o620))
    assert len(read_keys_file(write_keys(tmp_path, f"one:{ONE}", 0o644))) == 1
    assert "everybody on this machine may read" in caplog.text
    with pytest.raises(StartupError, match="--api-keys-file"):
        read_keys_file(tmp_path / "nowhere")


def test_salt_needs_keys_of_either_kind() -> None:
    flags = ["--decode", "127.0.0.1:1", "--salt-by-api-key"]
    assert parse_settings(RouterSettings, [*flags, "--api-keys-file", "keys"]).salt_by_api_key


async def test_names_are_in_logs_and_metrics_and_keys_are_not(
    tmp_path: Path, tokenizer: Tokenizer, defaults: GenerationDefaults, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    keys = [*plain_keys("plain-secret"), *read_keys_file(write_keys(tmp_path, f"one:{ONE}"))]
    async with running(make_served(tokenizer, defaults, keys=KeyRing(keys))) as edge:
        for key, status in (("plain-secret", 200), ("key-of-one", 200), ("wrong-secret", 401)):
            reply = await edge.http.post("/v1/completions", json=BODY, headers=bearer(key))
            assert reply.status_code == status
        page = (await edge.http.get("/metrics", headers=bearer("key-of-one"))).text
    ours = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("services"))
    assert "of one: /v1/completions 200" in ours
    assert "of key-1: /v1/completions 200" in ours
    assert 'relevo_http_client_requests_total{client="one",status="200"} 1.0' in page
    assert 'relevo_http_client_requests_total{client="key-1",status="200"} 1.0' in page
    for secret in ("plain-secret", "key-of-one", "wrong-secret", ONE):
        assert secret not in ours + page


async def test_names_in_metrics_are_bounded(fresh_edge: Edge) -> None:
    metrics = EdgeMetrics(fresh_edge.connection_registry)
    for number in range(MAX_CLIENTS + 5):
        metrics.count_client(f"client-{number}", 200)
    labels = {"client": "other", "status": "200"}
    assert fresh_edge.connection_registry.get_sample_value("relevo_http_client_requests_total", labels) == 5


def test_a_bucket_lets_a_burst_through_and_then_its_rate() -> None:
    bucket = TokenBucket(rate=2.0, burst=3.0, level=3.0, filled_at=10.0)
    assert [bucket.take(10.0) for _ in range(3)] == [0, 0, 0]
    assert bucket.take(10.0) == 0.5
    assert bucket.take(10.25) == 0.25
    assert bucket.take(10.5) == 0
    assert [bucket.take(100.0) for _ in range(4)] == [0, 0, 0, 0.5]


async def test_a_keys_rate_is_its_own(tokenizer: Tokenizer, defaults: GenerationDefaults) -> None:
    slow = ApiKey("slow", bytes.fromhex(ONE), rps=0.01, burst=2)
    free = ApiKey("free", bytes.fromhex(TWO))
    async with running(make_served(tokenizer, defaults, keys=KeyRing([slow, free]))) as edge:
        replies = [await edge.http.post("/v1/completions", json=BODY, headers=bearer("key-of-one")) for _ in range(3)]
        assert [reply.status_code for reply in replies] == [200, 200, 429]
        assert 90 <= int(replies[2].headers["retry-after"]) <= 100
        error = replies[2].json()["error"]
        assert error["code"] == "rate_limit_exceeded"
        assert "'slow' may send 0.01 requests a second" in error["message"]
        assert (await edge.http.get("/v1/models", headers=bearer("key-of-one"))).status_code == 200
        reply = await edge.http.post("/v1/completions", json=BODY, headers=bearer("key-of-two"))
        assert reply.status_code == 200


async def test_a_keys_concurrency_is_given_back_however_a_request_ends(
    tokenizer: Tokenizer, defaults: GenerationDefaults
) -> None:
    key = ApiKey("one", bytes.fromhex(ONE), concurrency=1)
    async with running(make_served(tokenizer, defaults, keys=KeyRing([key]))) as edge:

        async def post() -> int:
            reply = await edge.http.post("/v1/completions", json=BODY, headers=bearer("key-of-one"))
            return reply.status_code

        edge.dispatcher.script = lambda request: [TokensEvent([300]), HANG]
        async with posted(edge, BODY | {"stream": True}, "Authorization: Bearer key-of-one\r\n") as (reader, _):
            await reader.readuntil(b"data: ")
            assert await post() == 429
        edge.dispatcher.script = lambda request: [ZeroDivisionError()]
        async with asyncio.timeout(5):
            while await post() == 429:  # until the server has seen that the first client left
                pass
        assert await post() == 500
        reply = await edge.http.post("/v1/completions", json={"prompt": []}, headers=bearer("key-of-one"))
        assert reply.status_code == 400
        assert await post() == 500
