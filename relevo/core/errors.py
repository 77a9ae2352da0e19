"""The one exception tree. A class says how it looks from outside: its gRPC code and its HTTP status.

RelevoError
├── InvalidRequest       INVALID_ARGUMENT     400   (413 when too large)
├── Unauthenticated      UNAUTHENTICATED      401
├── NotFound             NOT_FOUND            404
├── Exhausted            RESOURCE_EXHAUSTED   429
├── Cancelled            CANCELLED            499
├── Mismatch             FAILED_PRECONDITION  500   never retried
├── DataLoss             DATA_LOSS            500   recomputed, so that no client sees it
├── Unavailable          UNAVAILABLE          503   the only one that is retried
├── DeadlineExceeded     DEADLINE_EXCEEDED    504
└── StartupError         FAILED_PRECONDITION  500   a process cannot start: its message is the whole output
"""

from __future__ import annotations


class RelevoError(Exception):
    """An error of the world, not a bug of ours. The message says what was wrong, which value, and what is right."""

    grpc_code: str = "INTERNAL"
    http_status: int = 500
    error_type: str = "server_error"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequest(RelevoError):
    """The request is wrong; `param` names the parameter at fault."""

    grpc_code = "INVALID_ARGUMENT"
    http_status = 400
    error_type = "invalid_request_error"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PayloadTooLarge(InvalidRequest):
    """The request's body exceeds the limit."""

    http_status = 413


class Unauthenticated(RelevoError):
    """No key, or a wrong one."""

    grpc_code = "UNAUTHENTICATED"
    http_status = 401
    error_type = "authentication_error"


class NotFound(RelevoError):
    """What was named is not here."""

    grpc_code = "NOT_FOUND"
    http_status = 404
    error_type = "not_found_error"


class Exhausted(RelevoError):
    """No room now. `retry_after_seconds` says when to try again, 0 if unknown."""

    grpc_code = "RESOURCE_EXHAUSTED"
    http_status = 429
    error_type = "rate_limit_error"

    def __init__(self, message: str, retry_after_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class Cancelled(RelevoError):
    """The caller left."""

    grpc_code = "CANCELLED"
    http_status = 499


class Mismatch(RelevoError):
    """Two parts do not fit each other: layout, version, identity. Trying again cannot help."""

    grpc_code = "FAILED_PRECONDITION"


class DataLoss(RelevoError):
    """A block's bytes are not what its writer sealed."""

    grpc_code = "DATA_LOSS"


class Unavailable(RelevoError):
    """A peer is not there, draining, or cut off."""

    grpc_code = "UNAVAILABLE"
    http_status = 503
    error_type = "service_unavailable_error"


class DeadlineExceeded(RelevoError):
    """The time is over."""

    grpc_code = "DEADLINE_EXCEEDED"
    http_status = 504
    error_type = "timeout_error"


class StartupError(RelevoError):
    """A process cannot start. `main` prints the message as one line and exits with 1."""

    grpc_code = "FAILED_PRECONDITION"
