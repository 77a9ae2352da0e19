"""A request's structured outputs on the wire."""

from __future__ import annotations

from relevo.core.structured_outputs import StructuredOutputs
from services.pb import messages_pb2 as pb


def structured_outputs_to_proto(outputs: StructuredOutputs | None) -> pb.StructuredOutputs | None:
    if outputs is None:
        return None
    kind, source, is_compact = outputs.source
    message = pb.StructuredOutputs(disable_any_whitespace=is_compact)
    if kind == "choice":
        message.choice.texts.extend(source)
    else:
        setattr(message, kind, source)
    return message


def structured_outputs_from_proto(sampling: pb.SamplingParams) -> StructuredOutputs | None:
    """Raises InvalidRequest for a message that says nothing, or too much."""
    if not sampling.HasField("structured_outputs"):
        return None
    message = sampling.structured_outputs
    return StructuredOutputs(
        json=message.json if message.HasField("json") else None,
        regex=message.regex if message.HasField("regex") else None,
        choice=list(message.choice.texts) if message.HasField("choice") else None,
        grammar=message.grammar if message.HasField("grammar") else None,
        disable_any_whitespace=message.disable_any_whitespace,
    )
