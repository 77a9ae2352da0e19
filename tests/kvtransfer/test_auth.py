"""Who gets in: a shared token, certificates, and an agent that refuses to listen to the world with neither."""

from __future__ import annotations

import socket
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from relevo.core.errors import RelevoError, StartupError, Unauthenticated, Unavailable
from services.common.errors import error_from_rpc
from services.common.grpc import cancelling, make_channel
from services.common.security import NO_SECURITY, PeerSettings, Security, Tls, is_loopback, read_security
from services.kvtransfer.client import KvAgentClient
from services.pb import kvtransfer_pb2, kvtransfer_pb2_grpc, worker_pb2
from tests.support.certificates import identity, tls_settings

from .blocks import BLOCK_BYTES, FINGERPRINT, fetch_all, names, publish_all, take
from .conftest import SpawnAgent, StartAgent
from .test_processes import refusal

TOKEN = "correct horse battery staple"
OTHER_HOSTS = "0.0.0.0"


async def attach(address: str, security: Security) -> KvAgentClient:
    """A client, to be closed. Raises what attaching raises."""
    client = KvAgentClient(address, "worker-0", "incarnation", security)
    try:
        await client.attach(FINGERPRINT, BLOCK_BYTES)
    except RelevoError:
        await client.close()
        raise
    return client


async def test_who_knows_the_token_gets_in(start: StartAgent) -> None:
    agent = await start(kv_token=TOKEN)
    client = await attach(agent.address, Security(TOKEN))
    await publish_all(client, "a")
    assert await fetch_all(client, "a") == {}
    assert (await client.audit()).num_sealed == 1
    await client.close()


@pytest.mark.parametrize("token", [None, "", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "é" * 20])
async def test_who_does_not_is_told_what_to_set(start: StartAgent, token: str | None) -> None:
    agent = await start(kv_token=TOKEN)
    if token is not None and not token.isascii():
        return  # gRPC itself refuses to send it
    with pytest.raises(Unauthenticated, match="set RELEVO_KV_TOKEN"):
        await attach(agent.address, Security(token))


async def test_every_method_asks_for_the_token_but_health(start: StartAgent) -> None:
    agent = await start(kv_token=TOKEN)
    async with make_channel(agent.address) as channel:
        stub = kvtransfer_pb2_grpc.KvTransferStub(channel)
        for call in (
            stub.Publish(timeout=5),
            stub.Fetch(timeout=5),
            stub.WatchBlocks(worker_pb2.WatchBlocksRequest(), timeout=5),
            stub.ListBlocks(kvtransfer_pb2.ListBlocksRequest(limit=1), timeout=5),
            stub.Audit(kvtransfer_pb2.AuditRequest(), timeout=5),
            stub.GetTiers(kvtransfer_pb2.GetTiersRequest(), timeout=5),
            stub.ClearBlocks(kvtransfer_pb2.ClearBlocksRequest(), timeout=5),
        ):
            with cancelling(call), pytest.raises(grpc.aio.AioRpcError) as caught:
                await (call if isinstance(call, grpc.aio.UnaryUnaryCall) else call.read())
            assert isinstance(error_from_rpc(caught.value), Unauthenticated)
        reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING


async def test_agents_with_the_same_token_pull_from_each_other(start: StartAgent) -> None:
    source, target, stranger = await start(kv_token=TOKEN), await start(kv_token=TOKEN), await start()
    prefill, decode = await attach(source.address, Security(TOKEN)), await attach(target.address, Security(TOKEN))
    await publish_all(prefill, "a")
    async with decode.fetch(names("a"), source.address, timeout_seconds=5) as fetch:
        assert await take(fetch, "a") == {}
    outside = await attach(stranger.address, NO_SECURITY)
    async with outside.fetch(names("a"), source.address, timeout_seconds=5) as fetch:
        assert list((await take(fetch, "a")).values()) == [grpc.StatusCode.UNAVAILABLE.value[0]]
    for client in (prefill, decode, outside):
        await client.close()


def test_world_open_agent_without_a_secret_refuses_to_start(spawn: SpawnAgent, tmp_path: Path) -> None:
    arena = ("--kv-arena", "64k", "--arena-dir", str(tmp_path), "--port", "0")
    line = refusal("--host", OTHER_HOSTS, "--advertise-host", "127.0.0.1", *arena)
    assert "set RELEVO_KV_TOKEN (or --kv-token-file)" in line
    assert "--tls-cert, --tls-key and --tls-ca" in line
    token_file = tmp_path / "token"
    token_file.write_text(f"{TOKEN}\n")
    flags = ("--host", OTHER_HOSTS, "--advertise-host", "127.0.0.1", "--kv-token-file", str(token_file))
    assert spawn(*flags).address


def test_settings_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_text("short")
    for settings, reason in (
        (PeerSettings(kv_token_file=tmp_path / "nowhere"), "--kv-token-file .*nowhere: No such file"),
        (PeerSettings(kv_token_file=short), "at least 16 printable"),
        (PeerSettings(kv_token_file=short, kv_token=TOKEN), "one of them"),
        (PeerSettings(tls_cert=short), "belong together"),
        (PeerSettings(tls_ca=tmp_path / "nowhere"), "--tls-ca"),
    ):
        with pytest.raises(StartupError, match=reason):
            read_security(settings)
    with pytest.raises(StartupError, match="--tls-cert and --tls-key are missing"):
        Security(tls=Tls(ca=b"x")).server_credentials()
    assert TOKEN not in repr(Security(TOKEN))


@pytest.mark.parametrize(
    ("host", "tls", "warned"), [("10.0.0.1", False, True), ("10.0.0.1", True, False), ("::1", False, False)]
)
def test_token_in_the_clear_is_a_warning(host: str, tls: bool, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    Security(TOKEN, Tls(cert=b"x", key=b"x") if tls else None).check_host(host)
    assert ["travels in the clear; give --tls-cert" in record.message for record in caplog.records] == [True] * warned


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *((host, True) for host in ("127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost")),
        *((host, False) for host in ("0.0.0.0", "::", "10.0.0.1", "example.com", "")),
    ],
)
def test_loopback_is_recognized(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


async def test_certificates_let_peers_in_and_keep_strangers_out(start: StartAgent, certificates: Path) -> None:
    agent = await start(**tls_settings(certificates, "peer"))
    client = await attach(agent.address, identity(certificates, "peer"))
    await publish_all(client, "a")
    assert await fetch_all(client, "a") == {}
    await client.close()
    only_ca = read_security(PeerSettings(tls_ca=certificates / "ca.pem"))
    for security in (NO_SECURITY, only_ca, identity(certificates, "stranger")):
        with pytest.raises(Unavailable):
            await attach(agent.address, security)


async def test_agent_with_another_certificate_is_not_talked_to(start: StartAgent, certificates: Path) -> None:
    impostor = await start(tls_cert=certificates / "stranger.pem", tls_key=certificates / "stranger.key")
    with pytest.raises(Unavailable):
        await attach(impostor.address, identity(certificates, "peer"))
    with socket.create_connection(("127.0.0.1", int(impostor.address.rpartition(":")[2])), timeout=5):
        pass  # it listens: the certificate was the reason
