"""Random JSON schemas, the same for the same seed: nested, enums, bounds, patterns, optional properties and $ref."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]

PATTERNS = (
    "^[a-z]{2,6}$",
    "^[A-Z][a-z]{0,5} [0-9]{1,3}$",
    r"^\d{3}-\d{4}$",
    "^(red|green|blue)( (light|dark))?$",
    "^[^\"\\\\]{3,9}$",
    "ab",
)  # fmt: skip
WORDS = ("id", "name", "größe", "a b", 'q"uote', "back\\slash", "<|im_end|>", "tags", "x", "note", "Ω", "new\nline")
SCALARS: tuple[Any, ...] = (None, True, False, 0, -17, 3.5, "", "yes", "no", "<|im_start|>", "ä/ö", [], {}, [1, "two"])


def random_schema(seed: int) -> Schema:
    """Satisfiable, and every text that fits it is finite or may be ended soon."""
    rng = random.Random(seed)
    schema = _object(rng, depth=3) if rng.random() < 0.7 else _any(rng, depth=3)
    names = ("leaf", "node")
    schema["$defs"] = {
        "leaf": _scalar(rng),
        "node": {
            "type": "object",
            "properties": {"value": _scalar(rng), "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
            "required": ["value", "next"],
            "additionalProperties": False,
        },
    }
    assert set(schema["$defs"]) == set(names)
    return schema


def _any(rng: random.Random, depth: int) -> Schema:
    if depth == 0 or rng.random() < 0.4:
        return _scalar(rng)
    make = rng.choice((_object, _object, _array, _any_of, _reference, _tuple))
    return make(rng, depth - 1)


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(WORDS, rng.randint(1, 5))
    schema: Schema = {
        "type": "object",
        "properties": {name: _any(rng, depth) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
    }
    if rng.random() < 0.8:
        schema["additionalProperties"] = False
    elif rng.random() < 0.5:
        schema["additionalProperties"] = _scalar(rng)
    return schema


def _array(rng: random.Random, depth: int) -> Schema:
    least = rng.randint(0, 2)
    return {"type": "array", "items": _any(rng, depth), "minItems": least, "maxItems": least + rng.randint(0, 2)}


def _tuple(rng: random.Random, depth: int) -> Schema:
    items = [_any(rng, depth) for _ in range(rng.randint(1, 3))]
    return {"type": "array", "prefixItems": items, "minItems": len(items), "items": False}


def _any_of(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [_any(rng, depth) for _ in range(rng.randint(2, 3))]}


def _reference(rng: random.Random, depth: int) -> Schema:
    return {"$ref": f"#/$defs/{rng.choice(('leaf', 'node'))}"}


def _scalar(rng: random.Random) -> Schema:
    return rng.choice((_integer, _number, _string, _pattern, _enum, _simple))(rng)


def _integer(rng: random.Random) -> Schema:
    low = rng.randint(-1000, 1000)
    high = low + rng.randint(12, 5000)
    schema: Schema = {"type": "integer", rng.choice(("minimum", "exclusiveMinimum")): low}
    if rng.random() < 0.7:
        schema[rng.choice(("maximum", "exclusiveMaximum"))] = high
    if rng.random() < 0.2:
        schema["multipleOf"] = rng.choice((2, 3, 5))
    if rng.random() < 0.2:
        return {"allOf": [schema, {"type": "integer", "maximum": high}]}
    return schema


def _number(rng: random.Random) -> Schema:
    low = round(rng.uniform(-100, 100), rng.randint(0, 3))
    return {"type": "number", "minimum": low, rng.choice(("maximum", "exclusiveMaximum")): low + rng.randint(1, 500)}


def _string(rng: random.Random) -> Schema:
    least = rng.randint(0, 4)
    kind: Any = ["string", "null"] if rng.random() < 0.2 else "string"
    return {"type": kind, "minLength": least, "maxLength": least + rng.randint(0, 12)}


def _pattern(rng: random.Random) -> Schema:
    return {"type": "string", "pattern": rng.choice(PATTERNS), "maxLength": 24}


def _enum(rng: random.Random) -> Schema:
    if rng.random() < 0.2:
        return {"const": rng.choice(SCALARS)}
    return {"enum": rng.sample(SCALARS, rng.randint(1, 5))}


def _simple(rng: random.Random) -> Schema:
    return {"type": rng.choice(("boolean", "null", ["boolean", "integer"]))}
