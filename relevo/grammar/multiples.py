"""What multiples in a JSON schema cost: llguidance makes a state of each remainder, at once and uninterrupted."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

MAX_REMAINDERS = 100_000  # of all `multipleOf` together: some 0.4 s


def check_multiples(schema: Any) -> None:
    """Raises ValueError if they are too many."""
    total = _num_remainders(schema)
    if total > MAX_REMAINDERS:
        raise ValueError(f"too large: its multipleOf are {total:,} together, of at most {MAX_REMAINDERS:,}")


def _num_remainders(schema: Any) -> int:
    if isinstance(schema, list):
        return sum(map(_num_remainders, schema))
    if not isinstance(schema, dict):
        return 0
    own = schema.get("multipleOf", 0)
    # Powers of ten are seen by the digits behind them.
    digits = Decimal(str(own)).normalize().as_tuple().digits if _is_number(own) else (0,)
    return int("".join(map(str, digits))) + sum(map(_num_remainders, schema.values()))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
