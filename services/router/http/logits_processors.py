"""The field `logits_processors`, in the shape that vLLM's has."""

from __future__ import annotations

from typing import Any, NotRequired

import orjson
from typing_extensions import TypedDict

from relevo.core.errors import InvalidRequest
from relevo.core.sampling_params import LogitsProcessorCall

MAX_PROCESSORS = 16
MAX_ARGUMENT_BYTES = 16_384
_NAME = "logits_processors"


class LogitsProcessorBody(TypedDict):
    """qualname: of an entry point in the group relevo.logits_processors"""

    qualname: str
    args: NotRequired[list[Any]]
    kwargs: NotRequired[dict[str, Any]]


def parse_logits_processors(value: object) -> list[LogitsProcessorCall]:
    """Whether there are such processors the workers say, who have them."""
    if not isinstance(value, list) or len(value) > MAX_PROCESSORS:
        raise InvalidRequest(f"{_NAME} must be a list of at most {MAX_PROCESSORS}", _NAME)
    return [_parse(item) for item in value]


def _parse(item: object) -> LogitsProcessorCall:
    if isinstance(item, str) and item:
        return LogitsProcessorCall(item)
    if not isinstance(item, dict) or not isinstance(item.get("qualname"), str) or not item["qualname"]:
        raise InvalidRequest(f'{_NAME} must hold names, or objects like {{"qualname": name, "kwargs": {{}}}}', _NAME)
    known = {"args": [], "kwargs": {}} | {name: given for name, given in item.items() if given is not None}
    args, kwargs = known["args"], known["kwargs"]
    if not isinstance(args, list) or not isinstance(kwargs, dict) or item.keys() - {"qualname", "args", "kwargs"}:
        raise InvalidRequest(f"{_NAME}: of {item['qualname'][:80]!r}, args must be a list and kwargs an object", _NAME)
    if not args and not kwargs:
        return LogitsProcessorCall(item["qualname"])
    arguments = orjson.dumps({"args": args, "kwargs": kwargs})
    if len(arguments) > MAX_ARGUMENT_BYTES:
        raise InvalidRequest(f"{_NAME}: arguments must be at most {MAX_ARGUMENT_BYTES} bytes of JSON", _NAME)
    return LogitsProcessorCall(item["qualname"], arguments.decode())
