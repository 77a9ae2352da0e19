"""Regular expressions in JSON schemas, so written that llguidance takes them at their word.

Where a class of characters holds all control characters, as [^"] does, llguidance 1.9 lets a string have every escape
of one letter, those of the quote and the backslash among them, whether the class holds these or not. A class without
NUL is taken apart by character.
So NUL is taken out of every negated class: what fits then fits the schema, and nobody misses a NUL in an answer.
"""

from __future__ import annotations

import re
from typing import Any

_NUL = r"\x00"
_NEGATED_CLASS = re.compile(r"\\.|\[\^\]?", re.DOTALL)  # an escape, or where a class that is negated begins
_VALUES = frozenset({"const", "default", "enum", "examples"})  # hold JSON, not schemas
_BY_NAME = frozenset({"$defs", "definitions", "dependentSchemas", "properties"})


def with_exact_patterns(schema: Any) -> Any:
    """The schema with NUL excluded from the negated classes of its patterns."""
    if isinstance(schema, list):
        return [with_exact_patterns(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _keyword(key, value) for key, value in schema.items()}


def _keyword(key: str, value: Any) -> Any:
    if key in _VALUES:
        return value
    if key == "pattern" and isinstance(value, str):
        return exact_pattern(value)
    if key == "patternProperties" and isinstance(value, dict):
        return {exact_pattern(pattern): with_exact_patterns(item) for pattern, item in value.items()}
    if key in _BY_NAME and isinstance(value, dict):
        return {name: with_exact_patterns(item) for name, item in value.items()}
    return with_exact_patterns(value)


def exact_pattern(pattern: str) -> str:
    return _NEGATED_CLASS.sub(lambda found: found[0] if found[0][0] == "\\" else found[0] + _NUL, pattern)
