"""`relevo serve` with a token, or with certificates: everything works as without, and strangers get in nowhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from services.pb import (
    kvtransfer_pb2,
    kvtransfer_pb2_grpc,
    router_pb2,
    router_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)
from tests.e2e.test_serve import LONG_PROMPT, MODEL, SMALL, Serve
from tests.support.certificates import tls_settings

TOKEN = "correct horse battery staple"
REFUSED_WITH = {"token": grpc.StatusCode.UNAUTHENTICATED, "certificates": grpc.StatusCode.UNAVAILABLE}


class Guarded:
    """A fleet that asks who is there."""

    def __init__(self, by: str, certificates: Path) -> None:
        self.refused_with = REFUSED_WITH[by]
        self._certificates = certificates if by == "certificates" else None
        settings = tls_settings(certificates, "peer") if by == "certificates" else {"kv_token": TOKEN}
        with pytest.MonkeyPatch.context() as patch:
            for name, value in settings.items():
                patch.setenv(f"RELEVO_{name.upper()}", str(value))
            self.serve = Serve(*SMALL)

    def num_sealed(self) -> int:
        """Blocks that the agent holds, asked for by one who may."""
        address, request = self.serve.child("kvtransfer").grpc_address, kvtransfer_pb2.AuditRequest()
        if self._certificates is None:
            with grpc.insecure_channel(address) as channel:
                metadata = (("authorization", f"Bearer {TOKEN}"),)
                stub = kvtransfer_pb2_grpc.KvTransferStub(channel)
                return stub.Audit(request, timeout=10, metadata=metadata).num_sealed
        ca, key, cert = ((self._certificates / name).read_bytes() for name in ("ca.pem", "peer.key", "peer.pem"))
        with grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, key, cert)) as channel:
            return kvtransfer_pb2_grpc.KvTransferStub(channel).Audit(request, timeout=10).num_sealed


@pytest.fixture(scope="module", params=["token", "certificates"])
def guarded(request: pytest.FixtureRequest, certificates: Path) -> Iterator[Guarded]:
    guarded = Guarded(request.param, certificates)
    try:
        yield guarded
        code, error = guarded.serve.stop()
        said = [line for line in error.splitlines() if "Handshake failed" not in line]  # gRPC's, of the stranger below
        assert (code, said) == (0, [])
    finally:
        guarded.serve.kill()


def test_blocks_are_handed_over(guarded: Guarded) -> None:
    answer = guarded.serve.client.completions.create(model=MODEL, prompt=LONG_PROMPT, max_tokens=4, temperature=0)
    assert answer.choices[0].finish_reason == "length"
    assert guarded.num_sealed() > 0, "nothing was handed over: the split way was not taken"


def test_every_process_asks_who_is_there(guarded: Guarded) -> None:
    get_info, list_workers = worker_pb2.GetInfoRequest(), router_pb2.ListWorkersRequest()
    for name, ask in (
        ("kvtransfer", lambda on: kvtransfer_pb2_grpc.KvTransferStub(on).Audit(kvtransfer_pb2.AuditRequest())),
        ("prefill-0", lambda on: worker_pb2_grpc.WorkerStub(on).GetInfo(get_info)),
        ("decode-0", lambda on: worker_pb2_grpc.WorkerStub(on).GetInfo(get_info)),
        ("router", lambda on: router_pb2_grpc.RouterStub(on).ListWorkers(list_workers)),
    ):
        with grpc.insecure_channel(guarded.serve.child(name).grpc_address) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                ask(channel)
            assert caught.value.code() is guarded.refused_with, name
