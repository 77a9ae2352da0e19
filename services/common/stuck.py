"""When an engine counts as stuck: a process whose engine hangs answers all the same (docs/adr/0014)."""

from __future__ import annotations

STUCK_SECONDS = 30.0  # a step that takes so long, and STUCK_FACTOR times as long as any before, never ends
STUCK_FACTOR = 4.0


def is_stuck(step_age_seconds: float, longest_step_seconds: float, stuck_seconds: float) -> bool:
    """longest_step_seconds: of late; a long prompt's steps may take a minute each"""
    return step_age_seconds > max(stuck_seconds, STUCK_FACTOR * longest_step_seconds)
