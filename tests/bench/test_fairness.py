from __future__ import annotations

from relevo.bench.fairness import measure_fairness
from relevo.engine.config import EngineConfig
from relevo.engine.engine import Engine


def test_all_chats_get_a_token_in_every_step_while_a_long_prompt_is_read() -> None:
    """In tokens a step, not in time: what the prompt gets is what was measured to take as long as a plain step."""
    engine = Engine(EngineConfig(kv_cache_memory=64 << 20, dtype="float32", threads=1))
    beside: list[dict[str, int]] = []
    schedule = engine.scheduler.schedule

    def recorded(num_drafts: dict[str, int] | None = None) -> object:
        output = schedule(num_drafts)
        rows = {entry.request.request_id: entry.num_scheduled_tokens for entry in output.scheduled}
        if "long" in rows:
            beside.append(rows)
            limit = max(4.0, engine.scheduler.prompt_tokens_per_step or 0.0)
            assert rows["long"] <= min(limit, 512), (rows, limit)
        return output

    engine.scheduler.schedule = recorded  # type: ignore[method-assign,assignment]
    result = measure_fairness(engine, step_stretch=2.0, num_chats=4, input_len=1000, seed=0)
    assert len(beside) > 2 and all(len(rows) == 5 for rows in beside)
    assert sum(rows["long"] for rows in beside) == 1000
    assert result.itl_p99_ms >= result.itl_p50_ms > 0 and result.ttft_seconds > 0
    engine.scheduler.check()
