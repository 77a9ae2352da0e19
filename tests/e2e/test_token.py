"""`relevo serve` with a token: everything works as without, and whoever does not know it gets in nowhere."""

from __future__ import annotations

from collections.abc import Iterator

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

TOKEN = "correct horse battery staple"
METADATA = (("authorization", f"Bearer {TOKEN}"),)


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RELEVO_KV_TOKEN", TOKEN)
        serve = Serve(*SMALL)
    try:
        yield serve
        assert serve.stop() == (0, "")
    finally:
        serve.kill()


def test_blocks_are_handed_over(serve: Serve) -> None:
    answer = serve.client.completions.create(model=MODEL, prompt=LONG_PROMPT, max_tokens=4, temperature=0)
    assert answer.choices[0].finish_reason == "length"
    with grpc.insecure_channel(serve.child("kvtransfer").grpc_address) as channel:
        stub = kvtransfer_pb2_grpc.KvTransferStub(channel)
        audit = stub.Audit(kvtransfer_pb2.AuditRequest(), timeout=10, metadata=METADATA)
    assert audit.num_sealed > 0, "nothing was handed over: the split way was not taken"


def test_every_process_asks_for_the_token(serve: Serve) -> None:
    get_info, list_workers = worker_pb2.GetInfoRequest(), router_pb2.ListWorkersRequest()
    for name, ask in (
        ("kvtransfer", lambda on: kvtransfer_pb2_grpc.KvTransferStub(on).Audit(kvtransfer_pb2.AuditRequest())),
        ("prefill-0", lambda on: worker_pb2_grpc.WorkerStub(on).GetInfo(get_info)),
        ("decode-0", lambda on: worker_pb2_grpc.WorkerStub(on).GetInfo(get_info)),
        ("router", lambda on: router_pb2_grpc.RouterStub(on).ListWorkers(list_workers)),
    ):
        with grpc.insecure_channel(serve.child(name).grpc_address) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                ask(channel)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED, name
