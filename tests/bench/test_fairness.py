from __future__ import annotations

from relevo.bench.fairness import measure_fairness
from relevo.engine.config import EngineConfig
from relevo.engine.engine import Engine


def test_all_chats_get_a_token_in_every_step_while_a_long_prompt_is_read() -> None:
    """In tokens a step, not in time: what the prompt gets is what is believed to take no longer than it may."""
    engine = Engine(EngineConfig(kv_cache_memory=64 << 20, dtype="float32", threads=1))
    chunks: list[int] = []
    schedule = engine.scheduler.schedule

    def recorded(num_drafts: dict[str, int] | None = None) -> object:
        limit = engine.scheduler.prompt_limit
        decoding = {r.request_id for r in engine.scheduler.running if r.num_uncomputed_tokens == 1}
        output = schedule(num_drafts)
        rows = {entry.request.request_id: entry for entry in output.scheduled}
        assert decoding <= rows.keys()
        if "long" in rows and decoding:
            assert limit is not None
            position, num_tokens = rows["long"].request.num_computed_tokens, rows["long"].num_scheduled_tokens
            assert num_tokens <= max(4, limit.costs.num_tokens(position, limit.seconds)), (position, num_tokens)
            chunks.append(num_tokens)
        return output

    engine.scheduler.schedule = recorded  # type: ignore[method-assign,assignment]
    result = measure_fairness(engine, step_stretch=2.0, num_chats=4, input_len=1000, num_cached=100, seed=0)
    assert len(chunks) > 2 and sum(chunks) == 1000 - 100 // 16 * 16
    assert result.itl_p99_ms >= result.itl_p50_ms > 0 and result.ttft_seconds > 0
    engine.scheduler.check()
