"""The router's part in a split request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from services.pb import decode_pb2, messages_pb2, prefill_pb2
from tests.workers.harness import RouterStream, submit_prefill, submit_split


@dataclass
class Pair:
    """A router's streams to a prefill and a decode worker, and its half of a split request's sequence."""

    to_prefill: RouterStream[prefill_pb2.PrefillCommand]
    to_decode: RouterStream[decode_pb2.DecodeCommand]
    max_tokens: int = field(default=6, kw_only=True)

    async def submit(self, handle: int, prompt: list[int], source: tuple[str, int] | None = None, **fields: Any) -> str:
        """Both submits; returns where the blocks are announced. source: the agent that prefill takes blocks from."""
        await self.to_decode.send(submit_split(handle, prompt, self.max_tokens, **fields))
        accepted = await self.to_decode.next(handle, "accepted")
        command = submit_prefill(
            handle, prompt, self.max_tokens, num_blocks_at_decode=accepted.num_cached_blocks, **fields
        )
        if source is not None:
            command.submit.source_agent_address, command.submit.num_blocks_at_source = source
        await self.to_prefill.send(command)
        announced = await self.to_prefill.next(handle, "announced")
        return str(announced.agent_address)

    async def fetch(self, address: str, handle: int = 1) -> None:
        fetch_kv = decode_pb2.FetchKv(source_agent_address=address)
        await self.to_decode.send(decode_pb2.DecodeCommand(handle=handle, fetch_kv=fetch_kv))

    async def relay_first_token(self, handle: int = 1) -> int:
        first = await self.to_prefill.next(handle, "first_token")
        token_id = int(first.token_ids[0])
        await self.give_first_token(token_id, handle)
        return token_id

    async def give_first_token(self, token_id: int, handle: int = 1) -> None:
        first_token = decode_pb2.FirstToken(token_id=token_id)
        await self.to_decode.send(decode_pb2.DecodeCommand(handle=handle, first_token=first_token))

    async def compute_locally(self, handle: int = 1) -> None:
        local = decode_pb2.ComputeLocally()
        await self.to_decode.send(decode_pb2.DecodeCommand(handle=handle, compute_locally=local))

    async def cancel_decode(self, handle: int = 1) -> None:
        await self.to_decode.send(decode_pb2.DecodeCommand(handle=handle, cancel=decode_pb2.CancelDecode()))

    async def cancel_prefill(self, handle: int = 1) -> None:
        await self.to_prefill.send(prefill_pb2.PrefillCommand(handle=handle, cancel=prefill_pb2.CancelPrefill()))

    async def serve(
        self, handle: int, prompt: list[int], source: tuple[str, int] | None = None, **fields: Any
    ) -> list[int]:
        """A whole request, as the router drives it; its tokens."""
        await self.fetch(await self.submit(handle, prompt, source, **fields), handle)
        first = await self.relay_first_token(handle)
        _, prefilled = await self.to_prefill.rest(handle)
        if prefilled.finish_reason == messages_pb2.FINISH_REASON_STOP:
            await self.cancel_decode(handle)
        else:
            assert prefilled.finish_reason == messages_pb2.FINISH_REASON_LENGTH, prefilled
        token_ids, ended = await self.to_decode.rest(handle)
        assert not ended.HasField("error"), ended
        return [first, *token_ids]
