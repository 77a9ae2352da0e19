"""What one API key's requests have cached, another's don't find, where --salt-by-api-key says so."""

from __future__ import annotations

import pytest

from relevo.core.errors import StartupError
from relevo.model_files import GenerationDefaults
from relevo.tokenizer import Tokenizer
from services.common.config import parse_settings
from services.router.config import RouterSettings

from .conftest import Edge, make_served, running


async def salt_of(edge: Edge, api_key: str, cache_salt: str = "") -> str:
    """Of the request that reaches the workers."""
    body = {"prompt": "a", "max_tokens": 1, "cache_salt": cache_salt}
    reply = await edge.http.post("/v1/completions", json=body, headers={"authorization": f"Bearer {api_key}"})
    assert reply.status_code == 200, reply.text
    return edge.dispatcher.requests[-1].cache_salt


async def test_each_key_has_its_own_salt(tokenizer: Tokenizer, defaults: GenerationDefaults) -> None:
    served = make_served(tokenizer, defaults, api_key="key-one, key-two", salt_by_api_key=True)
    async with running(served) as edge:
        one, two = await salt_of(edge, "key-one"), await salt_of(edge, "key-two")
        assert one != two
        assert "key" not in one + two, "workers must not learn keys"
        assert await salt_of(edge, "key-one") == one
        assert await salt_of(edge, "key-one", "mine") == f"{one}mine"
        reply = await edge.http.get("/v1/models", headers={"authorization": "Bearer key-three"})
        assert reply.status_code == 401


async def test_keys_share_blocks_otherwise(tokenizer: Tokenizer, defaults: GenerationDefaults) -> None:
    async with running(make_served(tokenizer, defaults, api_key="key-one,key-two")) as edge:
        assert [await salt_of(edge, key) for key in ("key-one", "key-two")] == ["", ""]
        assert await salt_of(edge, "key-two", "mine") == "mine"


def test_salt_by_api_key_needs_keys() -> None:
    with pytest.raises(StartupError, match="without --api-key"):
        parse_settings(RouterSettings, ["--decode", "127.0.0.1:1", "--salt-by-api-key"])
